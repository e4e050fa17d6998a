// Index builders of the data pipeline, on numpy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Row of each item, by first-fit decreasing: the longest first, each into the first row with room.
// Items of equal length keep their order. Throws when an item exceeds the capacity.
static py::array_t<int64_t> first_fit_decreasing(const Lengths& lengths, int64_t capacity) {
  const auto length = lengths.unchecked<1>();
  std::vector<py::ssize_t> order(length.shape(0));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return length(a) > length(b); });
  py::array_t<int64_t> rows(length.shape(0));
  auto row_of = rows.mutable_unchecked<1>();
  std::vector<int64_t> room;
  for (const auto item : order) {
    if (length(item) > capacity) throw std::invalid_argument("an item exceeds the row's capacity");
    auto row = std::find_if(room.begin(), room.end(),
                            [&](int64_t space) { return space >= length(item); });
    if (row == room.end()) row = room.insert(room.end(), capacity);
    *row -= length(item);
    row_of(item) = row - room.begin();
  }
  return rows;
}

PYBIND11_MODULE(_data, module) {
  module.doc() = "Index builders of the data pipeline.";
  module.def("first_fit_decreasing", &first_fit_decreasing, py::arg("lengths"), py::arg("capacity"),
             "Row of each item, int64 (items,).");
}
