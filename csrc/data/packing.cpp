// Index builders of the data pipeline.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace py = pybind11;

// Row of each item, by first-fit decreasing: the longest first, each into the first row with room.
// Items of equal length keep their order. Throws when an item exceeds the capacity.
static std::vector<int64_t> first_fit_decreasing(const std::vector<int64_t>& lengths,
                                                 int64_t capacity) {
  std::vector<size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return lengths[a] > lengths[b]; });
  std::vector<int64_t> row_of(lengths.size()), room;
  for (const auto item : order) {
    if (lengths[item] > capacity) throw std::invalid_argument("an item exceeds the row's capacity");
    auto row = std::find_if(room.begin(), room.end(),
                            [&](int64_t space) { return space >= lengths[item]; });
    if (row == room.end()) row = room.insert(room.end(), capacity);
    *row -= lengths[item];
    row_of[item] = row - room.begin();
  }
  return row_of;
}

// Row, first token in it and number in it of each text; in a row texts keep their order.
static std::vector<std::tuple<int64_t, int64_t, int64_t>> text_places(
    const std::vector<int64_t>& lengths, int64_t capacity) {
  const auto row_of = first_fit_decreasing(lengths, capacity);
  std::vector<int64_t> used(lengths.size()), texts(lengths.size());
  std::vector<std::tuple<int64_t, int64_t, int64_t>> places;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const int64_t row = row_of[i];
    places.emplace_back(row, used[row], texts[row]++);
    used[row] += lengths[i];
  }
  return places;
}

PYBIND11_MODULE(_data, module) {
  module.doc() = "Index builders of the data pipeline.";
  module.def("text_places", &text_places, py::arg("lengths"), py::arg("capacity"),
             "Row, first token in it and number in it of each text.");
}
