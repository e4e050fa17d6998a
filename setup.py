"""Installs the package; builds the extensions in csrc/ where a C++ compiler is found."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# `optional`: without a compiler the package installs all the same, and uses its Python versions.
DATA = Pybind11Extension("megavlm._data", ["csrc/data/packing.cpp"], cxx_std=17, optional=True)

setup(
    packages=find_packages(include=["megavlm", "megavlm.*"]),
    package_data={"megavlm.eval": ["*.j2"]},
    ext_modules=[DATA],
    cmdclass={"build_ext": build_ext},
)
