// Index builders of the data pipeline.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace py = pybind11;
using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Row of each item, by first-fit decreasing: the longest first, each into the first row with room.
// Items of equal length keep their order. Throws when an item exceeds the capacity.
static std::vector<int64_t> first_fit_decreasing(const int64_t* lengths, size_t items,
                                                 int64_t capacity) {
  std::vector<size_t> order(items);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return lengths[a] > lengths[b]; });
  if (items > 0 && lengths[order[0]] > capacity)
    throw std::invalid_argument("an item exceeds the row's capacity");
  std::vector<int64_t> row_of(items), room;
  size_t row = 0;
  for (size_t i = 0; i < items; ++i) {
    const int64_t length = lengths[order[i]];
    // A row without room for an item has none for the next one of the same length.
    if (i > 0 && length < lengths[order[i - 1]]) row = 0;
    while (row < room.size() && room[row] < length) ++row;
    if (row == room.size()) room.push_back(capacity);
    room[row] -= length;
    row_of[order[i]] = row;
  }
  return row_of;
}

// Row, first token in it and number in it of each text, as three rows of an array; in a row texts
// keep their order.
static Numbers text_places(const Numbers& lengths, int64_t capacity) {
  const size_t texts = lengths.size();
  const int64_t* of_text = lengths.data();
  const auto row_of = first_fit_decreasing(of_text, texts, capacity);
  const size_t rows = texts == 0 ? 0 : *std::max_element(row_of.begin(), row_of.end()) + 1;
  std::vector<int64_t> used(rows), numbers(rows);
  Numbers places({size_t{3}, texts});
  auto at = places.mutable_unchecked<2>();
  for (size_t i = 0; i < texts; ++i) {
    const int64_t row = row_of[i];
    at(0, i) = row;
    at(1, i) = used[row];
    at(2, i) = numbers[row]++;
    used[row] += of_text[i];
  }
  return places;
}

PYBIND11_MODULE(_data, module) {
  module.doc() = "Index builders of the data pipeline.";
  module.def("text_places", &text_places, py::arg("lengths"), py::arg("capacity"),
             "Row, first token in it and number in it of each text: int64 (3, texts).");
}
