// Random problems for the kernels of csrc/, compared with plain loops in fp64. Linked with the CPU
// kernels or, with CHECK_CUDA defined, with the CUDA kernels under the emulator.
//
//   check --operation forward|backward|norm|all --cases N --seed S, and to fix what is random
//   otherwise: --rows --text --image --heads --kv-heads --width --q-norm --element --intervals;
//   --max-text and --max-image bound the random sizes. Case i of seed S is case 0 of seed S + i.
//
// The yardstick is the same computation with every step's result in the element type: a kernel's
// error, relative to fp64, may be twice that (plus what one rounding can do in a small problem); so
// may that of its worst element (plus a few roundings of the terms that make it).

#include <algorithm>
#include <array>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/norm.h"

#ifdef CHECK_CUDA
#include "emulator/engine.h"
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

using namespace megavlm;

namespace {

// ---- Options and random numbers

std::map<std::string, std::string> options;

int64_t option(const std::string& name, int64_t otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : std::stoll(found->second);
}

std::mt19937_64 generator;

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
// Small numbers as likely as large ones.
int64_t size_up_to(int64_t high) {
  return std::llround(std::exp(std::uniform_real_distribution<>(0, std::log(high))(generator)));
}
// Those, or all alike.
int64_t any_size(int64_t high) { return between(0, 1) ? size_up_to(high) : between(1, high); }
template <class T>
T any_of(std::initializer_list<T> values) {
  return values.begin()[between(0, values.size() - 1)];
}
double normal() { return std::normal_distribution<>()(generator); }

// ---- Memory

float bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Buffer {
  static constexpr int64_t GUARD = 512;  // bytes before and after
  uint8_t* memory;
  int64_t bytes;
  std::vector<bool> written;  // by byte: an output
  std::vector<uint8_t> before;

  explicit Buffer(int64_t bytes) : bytes(bytes), written(bytes) {
    const int64_t whole = (bytes + 2 * GUARD + 255) / 256 * 256;
    memory = static_cast<uint8_t*>(std::aligned_alloc(256, whole));
    std::memset(memory, 0xff, whole);  // NaN
    ASAN_POISON_MEMORY_REGION(memory, GUARD);
    ASAN_POISON_MEMORY_REGION(memory + GUARD + bytes, GUARD);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes + 2 * GUARD);
    std::free(memory);
  }
  uint8_t* data() { return memory + GUARD; }
  void remember() { before.assign(data(), data() + bytes); }
  bool intact() {
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes + 2 * GUARD);
    bool good = true;
    for (int64_t i = 0; i < GUARD; ++i)
      good &= memory[i] == 0xff && memory[GUARD + bytes + i] == 0xff;
    for (int64_t i = 0; i < bytes; ++i) good &= written[i] || data()[i] == before[i];
    return good;
  }
};

// Up to four axes, the last contiguous.
struct Tensor {
  std::shared_ptr<Buffer> buffer;
  Element element = Element::float32;
  int64_t offset = 0, size[4] = {}, stride[4] = {};

  int64_t element_bytes() const { return element == Element::bfloat16 ? 2 : 4; }
  uint8_t* data() const { return buffer->data() + offset * element_bytes(); }
  uint8_t* address(int64_t i, int64_t j, int64_t k, int64_t l) const {
    return data() +
           (i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3]) * element_bytes();
  }
  double at(int64_t i, int64_t j, int64_t k, int64_t l) const {
    uint32_t bits = 0;
    const uint8_t* from = address(i, j, k, l);
    std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 4 - element_bytes(), from, element_bytes());
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void set(int64_t i, int64_t j, int64_t k, int64_t l, double value) const {
    float x = value;
    if (element == Element::bfloat16) x = bfloat16(x);
    std::memcpy(address(i, j, k, l), reinterpret_cast<uint8_t*>(&x) + 4 - element_bytes(),
                element_bytes());
  }
  template <class F>
  void each(F&& f) const {
    for (int64_t i = 0; i < size[0]; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        for (int64_t k = 0; k < size[2]; ++k)
          for (int64_t l = 0; l < size[3]; ++l) f(i, j, k, l);
  }
  std::vector<double> values() const {
    std::vector<double> all;
    each([&](auto... at) { all.push_back(this->at(at...)); });
    return all;
  }
  void fill_normal(double deviation = 1, double mean = 0) const {
    each([&](auto... at) { set(at..., mean + deviation * normal()); });
  }
  void fill(const std::vector<double>& values) const {
    size_t next = 0;
    each([&](auto... at) { set(at..., values[next++]); });
  }
  const Tensor& output() const {
    each([&](auto... at) {
      for (int64_t i = 0; i < element_bytes(); ++i)
        buffer->written[address(at...) - buffer->data() + i] = true;
    });
    return *this;
  }
  View view() const { return {data(), stride[0], stride[1], stride[2]}; }
  Matrix matrix() const { return {data(), stride[2]}; }
};

// Memory order: a permutation of the first three axes, outermost first; `padding` elements after
// each run of the innermost of them.
Tensor tensor(Element element, std::array<int64_t, 4> size, std::array<int, 3> order = {0, 1, 2},
              int64_t padding = 0) {
  Tensor made;
  made.element = element;
  std::copy_n(size.begin(), 4, made.size);
  made.stride[3] = 1;
  int64_t next = size[3];
  for (int i = 2; i >= 0; --i) {
    made.stride[order[i]] = next;
    next = next * size[order[i]] + (i == 2 ? padding : 0);
  }
  made.buffer = std::make_shared<Buffer>(next * made.element_bytes());
  return made;
}

Tensor any_layout(Element element, int64_t rows, int64_t tokens, int64_t heads, int64_t width) {
  const auto order = any_of<std::array<int, 3>>({{1, 0, 2}, {1, 0, 2}, {0, 1, 2}, {0, 2, 1}});
  return tensor(element, {rows, tokens, heads, width}, order, any_of<int64_t>({0, 0, 8, 64}));
}

// ---- What came out

bool case_failed;
std::string running;                                     // the options of this case
std::string refusal;                                     // of the kernel
std::map<std::string, std::pair<double, double>> worst;  // relative error and that over the limit's

void complain(const char* format, auto... arguments) {
  case_failed = true;
  std::printf("    ");
  std::printf(format, arguments...);
  std::printf("\n");
}

// The results of one computation by name, in logical order.
using Results = std::map<std::string, std::vector<double>>;

// Vectors of `width` elements; `magnitude` is the sum of the absolute values that make each
// element.
void compare(const std::string& name, const Tensor& tensor, const Results& exact,
             const Results& yardstick, const Results& magnitudes, int64_t width) {
  if (!refusal.empty()) return;
  const bool bf16 = tensor.element == Element::bfloat16;
  // fp32: what the order of additions can do where terms cancel.
  const double unit = bf16 ? 0x1p-9 : 0x1p-19;
  const auto &actual = tensor.values(), &expected = exact.at(name), &model = yardstick.at(name);
  const auto& magnitude = magnitudes.at(name);
  double error2 = 0, model_error2 = 0, norm2 = 0, scale2 = 0, scale4 = 0, worst_model = 0;
  for (size_t first = 0; first < actual.size(); first += width) {
    double vector_scale2 = 0;
    for (size_t i = first; i < first + width; ++i) {
      const double model_error = std::abs(model[i] - expected[i]);
      error2 += std::pow(actual[i] - expected[i], 2);
      model_error2 += model_error * model_error;
      worst_model = std::max(worst_model, model_error);
      norm2 += expected[i] * expected[i];
      vector_scale2 += magnitude[i] * magnitude[i];
    }
    scale2 += vector_scale2;
    scale4 += vector_scale2 * vector_scale2;
  }
  const double typical = std::sqrt(scale2 / actual.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const double off = std::abs(actual[i] - expected[i]);
    const double limit =
        magnitude[i] == 0 ? 0 : 2 * worst_model + 8 * unit * std::max(magnitude[i], typical);
    if (!(off <= limit))
      return complain("%s: element %zu is %g, should be %g", name.c_str(), i, actual[i],
                      expected[i]);
  }
  if (scale2 == 0) return;
  // bfloat16: one rounding of each vector, averaged over as many vectors as matter.
  const double few = unit * std::sqrt(bf16 ? scale4 / scale2 : scale2);
  const double limit = 2 * std::sqrt(model_error2) + few, error = std::sqrt(error2);
  auto& [worst_relative, worst_ratio] = worst[name];
  worst_ratio = std::max(worst_ratio, error / limit);
  if (norm2 > 0.01 * scale2) worst_relative = std::max(worst_relative, error / std::sqrt(norm2));
  if (error > limit)
    complain("%s: error %.3g, limit %.3g, norm %.3g", name.c_str(), error, limit, std::sqrt(norm2));
}

void compare_logs(const Tensor& tensor, const Results& exact, const Results& yardstick) {
  if (!refusal.empty()) return;
  const auto &actual = tensor.values(), &expected = exact.at("lse"), &model = yardstick.at("lse");
  double error = 0, model_error = 0, largest = 1;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isinf(expected[i])) {
      if (actual[i] != expected[i])
        return complain("lse: element %zu is %g, not -inf", i, actual[i]);
      continue;
    }
    if (!std::isfinite(actual[i])) return complain("lse: element %zu is %g", i, actual[i]);
    error = std::max(error, std::abs(actual[i] - expected[i]));
    model_error = std::max(model_error, std::abs(model[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  const double limit = 2 * model_error + 4e-6 * largest;
  auto& [worst_error, worst_ratio] = worst["lse"];
  worst_error = std::max(worst_error, error);
  worst_ratio = std::max(worst_ratio, error / limit);
  if (error > limit) complain("lse: error %.3g, limit %.3g", error, limit);
}

void check_intact(const auto& tensors) {
  for (const Tensor* one : tensors)
    if (one->buffer && !one->buffer->intact()) complain("memory that is not output was written");
}

// ---- Calls

#ifdef CHECK_CUDA

template <class Call>
void with_workspace(int64_t bytes, Call&& call) {
  Buffer workspace(std::max<int64_t>(bytes, 1));
  workspace.written.assign(workspace.bytes, true);
  if (const char* error = call(workspace.data())) refusal = error;
  if (!workspace.intact()) complain("memory beyond the workspace was written");
}
void run(const CrossAttentionForward& x) {
  with_workspace(cuda::workspace_bytes(x),
                 [&](void* workspace) { return cuda::cross_attention(x, workspace, nullptr); });
}
void run(const CrossAttentionBackward& x) {
  with_workspace(cuda::workspace_bytes(x), [&](void* workspace) {
    return cuda::cross_attention_backward(x, workspace, nullptr);
  });
}
void run(const NormForward& x) {
  if (const char* error = cuda::norm(x, nullptr)) refusal = error;
}
void run(const NormBackward& x) {
  with_workspace(cuda::workspace_bytes(x),
                 [&](void* workspace) { return cuda::norm_backward(x, workspace, nullptr); });
}
constexpr bool ON_CUDA = true;

#else

// Random ranges, all at once.
void in_threads(int64_t n, const std::function<void(int64_t, int64_t)>& function) {
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n;) {
    const int64_t end = threads.size() == 3 ? n : between(begin + 1, n);
    threads.emplace_back(function, begin, end);
    begin = end;
  }
  for (auto& thread : threads) thread.join();
}
void run(const CrossAttentionForward& x) { cpu::cross_attention(x, in_threads); }
void run(const CrossAttentionBackward& x) { cpu::cross_attention_backward(x, in_threads); }
void run(const NormForward& x) { cpu::norm(x, in_threads); }
void run(const NormBackward& x) { cpu::norm_backward(x, in_threads); }
constexpr bool ON_CUDA = false;

#endif

Element any_element(bool any = true) {
  if (options.count("element"))
    return options["element"] == "bfloat16" ? Element::bfloat16 : Element::float32;
  return any && between(0, 1) ? Element::float32 : Element::bfloat16;
}

// ---- Attention

struct Attention {
  Element element;
  int64_t rows, text, image, heads, kv_heads, width, intervals;
  Tensor q, k, v, out, lse, grad_out, grad_q, grad_k, grad_v;
  std::vector<int32_t> low, high;
  float scale, epsilon;
};

constexpr const char* INTERVALS[] = {"all", "none",      "latest image", "earlier images",
                                     "any", "of 0 or 1", "beyond",       "mixed"};

void set_interval(const Attention& x, int64_t kind, int64_t t, const std::vector<int64_t>& starts,
                  int32_t& low, int32_t& high) {
  const int64_t images = starts.size() - 1;
  const int64_t latest = t * (images + 1) / x.text - 1;  // -1: none yet
  low = high = 0;
  switch (kind) {
    case 0:
      high = x.image;
      break;
    case 1:
      break;
    case 2:
      if (latest >= 0) low = starts[latest], high = starts[latest + 1];
      break;
    case 3:
      if (latest >= 0) high = starts[latest + 1];
      break;
    case 4:
      low = between(0, x.image), high = between(low, x.image);
      break;
    case 5:
      low = between(0, x.image - 1), high = low + between(0, 1);
      break;
    default:  // clamped by the CUDA kernels; high < low is empty
      low = between(-5, x.image + 5), high = between(-5, x.image + 5);
      if (!ON_CUDA)
        low = std::clamp<int32_t>(low, 0, x.image), high = std::clamp<int32_t>(high, 0, x.image);
  }
}

Attention random_attention() {
  Attention x;
  x.element = any_element(!ON_CUDA);
  x.text = option("text", any_size(option("max-text", 150)));
  x.image = option("image", any_size(option("max-image", 600)));
  x.width = option("width", any_of<int64_t>({64, 80, 96, 104, 128, 128}));
  const int64_t group = any_of<int64_t>({1, 2, 3, 6, 6, 8});
  const int64_t copies =
      60'000'000 / (x.text * x.image * x.width * group);  // that end in a second or so
  x.kv_heads = option("kv-heads", between(1, std::clamp<int64_t>(copies, 1, 3)));
  x.heads = option("heads", x.kv_heads * group);
  x.rows = option("rows", between(1, std::clamp<int64_t>(copies / x.kv_heads, 1, 4)));
  x.epsilon = option("q-norm", between(0, 1)) ? 1e-5f : -1.0f;
  x.scale = any_of({0.5f, 1.0f, 1.0f, 3.0f}) / std::sqrt(float(x.width));
  x.intervals = option("intervals", between(0, 7));
  x.q = any_layout(x.element, x.rows, x.text, x.heads, x.width);
  x.q.fill_normal(any_of({0.3, 1.0, 1.0}) * (x.epsilon < 0 ? 1 : 2));
  x.k = tensor(x.element, {1, x.image, x.kv_heads, 2 * x.width});
  x.k.fill_normal();
  x.v = x.k;
  x.v.offset = x.width;
  x.v.size[3] = x.k.size[3] = x.width;
  for (int64_t row = 0; row < x.rows; ++row) {
    std::vector<int64_t> starts = {0};  // of images: of random lengths, or tiles and a token each
    const bool tiles = between(0, 1);
    while (starts.back() < x.image)
      starts.push_back(std::min(x.image, starts.back() + (tiles ? 257 : size_up_to(x.image))));
    for (int64_t t = 0; t < x.text; ++t)
      set_interval(x, x.intervals == 7 ? between(0, 6) : x.intervals, t, starts,
                   x.low.emplace_back(), x.high.emplace_back());
  }
  return x;
}

// In Real arithmetic; `round` is applied to what would be stored as a tensor.
template <class Real, class Round>
Results attend(const Attention& x, bool backward, Round&& round, Results* magnitudes) {
  const int64_t width = x.width, group = x.heads / x.kv_heads;
  const auto read = [](const Tensor& tensor) {
    const auto all = tensor.values();
    return std::vector<Real>(all.begin(), all.end());
  };
  const auto q = read(x.q), k = read(x.k), v = read(x.v);
  const auto grad_out = backward ? read(x.grad_out) : q, out_given = backward ? read(x.out) : q;
  std::vector<Real> out(q.size()), lse(x.rows * x.heads * x.text), grad_q(q.size()),
      grad_k(k.size()), grad_v(k.size()), u(width), g(width), p(x.image), s(x.image);
  std::vector<double> out_size(q.size()), grad_q_size(q.size()), grad_k_size(k.size()),
      grad_v_size(k.size());
  const auto dot = [&](const Real* a, const Real* b) {
    Real sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
    return sum;
  };
  for (int64_t token = 0; token < x.rows * x.text; ++token)
    for (int64_t h = 0; h < x.heads; ++h) {
      const int64_t at = (token * x.heads + h) * width;
      const int64_t low = std::max(0, x.low[token]),
                    high = std::min<int64_t>(x.image, x.high[token]);
      const auto kv = [&](int64_t j) { return (j * x.kv_heads + h / group) * width; };
      Real& log = lse[(token / x.text * x.heads + h) * x.text + token % x.text];
      log = -std::numeric_limits<Real>::infinity();
      if (high <= low) continue;
      Real r = 1;
      if (x.epsilon >= 0) r = 1 / std::sqrt(dot(&q[at], &q[at]) / width + Real(x.epsilon));
      for (int64_t i = 0; i < width; ++i) u[i] = x.epsilon < 0 ? q[at + i] : round(q[at + i] * r);
      Real largest = -std::numeric_limits<Real>::infinity(), sum = 0;
      for (int64_t j = low; j < high; ++j) {
        s[j] = x.scale * dot(u.data(), &k[kv(j)]);
        largest = std::max(largest, s[j]);
      }
      for (int64_t j = low; j < high; ++j) sum += p[j] = std::exp(s[j] - largest);
      log = largest + std::log(sum);
      for (int64_t j = low; j < high; ++j) {
        // A backward pass has no more than the fp32 logarithm.
        p[j] = backward ? std::exp(s[j] - log) : p[j] / sum;
        for (int64_t i = 0; i < width; ++i) {
          out[at + i] += round(p[j]) * v[kv(j) + i];
          out_size[at + i] += std::abs(p[j] * v[kv(j) + i]);
        }
      }
      for (int64_t i = 0; i < width; ++i) out[at + i] = round(out[at + i]);
      if (!backward) continue;
      const Real* go = &grad_out[at];
      Real delta = 0, c = 0;
      if (std::is_same_v<Real, float>)
        delta = dot(go, &out_given[at]);
      else
        for (int64_t j = low; j < high; ++j) delta += p[j] * dot(go, &v[kv(j)]);
      std::fill(g.begin(), g.end(), 0);
      for (int64_t j = low; j < high; ++j) {
        const Real dp = dot(go, &v[kv(j)]), ds = round(p[j] * (dp - delta));
        const double ds_size = x.scale * p[j] * (std::abs(dp) + std::abs(delta));
        for (int64_t i = 0; i < width; ++i) {
          g[i] += x.scale * ds * k[kv(j) + i];
          grad_k[kv(j) + i] += x.scale * ds * u[i];
          grad_v[kv(j) + i] += round(p[j]) * go[i];
          grad_q_size[at + i] += r * ds_size * std::abs(k[kv(j) + i]);
          grad_k_size[kv(j) + i] += ds_size * std::abs(u[i]);
          grad_v_size[kv(j) + i] += std::abs(p[j] * go[i]);
        }
      }
      for (Real& one : g) one = round(one);
      if (x.epsilon >= 0) c = dot(g.data(), u.data()) / width;
      for (int64_t i = 0; i < width; ++i) grad_q[at + i] = round(r * (g[i] - u[i] * c));
    }
  const auto write = [&](const std::vector<Real>& all, bool rounded = true) {
    std::vector<double> written(all.begin(), all.end());
    if (!rounded)
      for (double& one : written) one = round(one);
    return written;
  };
  if (magnitudes)
    *magnitudes = {{"out", out_size},
                   {"grad_q", grad_q_size},
                   {"grad_k", grad_k_size},
                   {"grad_v", grad_v_size}};
  return {{"out", write(out)},
          {"lse", write(lse)},
          {"grad_q", write(grad_q)},
          {"grad_k", write(grad_k, false)},
          {"grad_v", write(grad_v, false)}};
}

std::string check_attention(bool backward) {
  Attention x = random_attention();
  const int64_t rows = x.rows, text = x.text, heads = x.heads, width = x.width;
  const bool bf16 = x.element == Element::bfloat16;
  x.out = any_layout(x.element, rows, text, heads, width);
  x.lse = tensor(Element::float32, {rows, heads, text, 1});
  if (backward) {
    x.grad_out = any_layout(x.element, rows, text, heads, width);
    x.grad_out.fill_normal();
    x.grad_q = any_layout(x.element, rows, text, heads, width).output();
    x.grad_k = tensor(x.element, {1, x.image, x.kv_heads, 2 * width}).output();
    x.grad_v = x.grad_k;
    x.grad_v.offset = width;
    x.grad_k.size[3] = x.grad_v.size[3] = width;
    const Results forward = attend<double>(x, false, [](double y) { return y; }, nullptr);
    x.out.fill(forward.at("out"));
    x.lse.fill(forward.at("lse"));
  } else {
    x.out.output();
    x.lse.output();
  }
  Results magnitudes;
  const Results exact = attend<double>(x, backward, [](double y) { return y; }, &magnitudes);
  const Results yardstick =
      attend<float>(x, backward, [&](float y) { return bf16 ? bfloat16(y) : y; }, nullptr);
  const auto tensors = {&x.q, &x.k, &x.out, &x.lse, &x.grad_out, &x.grad_q, &x.grad_k};
  for (const Tensor* one : tensors)
    if (one->buffer) one->buffer->remember();

  const CrossAttention problem{x.element,    rows,          text,       x.image,    heads,
                               x.kv_heads,   width,         x.q.view(), x.k.view(), x.v.view(),
                               x.low.data(), x.high.data(), x.scale,    x.epsilon};
  const auto keys = [](const Tensor& tensor) {
    View view = tensor.view();
    view.row_stride = 0;
    return view;
  };
  if (backward) {
    CrossAttentionBackward call;
    static_cast<CrossAttention&>(call) = problem;
    call.k = keys(x.k), call.v = keys(x.v);
    call.grad_out = x.grad_out.view(), call.out = x.out.view();
    call.lse = reinterpret_cast<const float*>(x.lse.data());
    call.grad_q = x.grad_q.view(), call.grad_k = keys(x.grad_k), call.grad_v = keys(x.grad_v);
    run(call);
    compare("grad_q", x.grad_q, exact, yardstick, magnitudes, width);
    compare("grad_k", x.grad_k, exact, yardstick, magnitudes, width);
    compare("grad_v", x.grad_v, exact, yardstick, magnitudes, width);
  } else {
    CrossAttentionForward call;
    static_cast<CrossAttention&>(call) = problem;
    call.k = keys(x.k), call.v = keys(x.v);
    call.out = x.out.view();
    call.lse = reinterpret_cast<float*>(x.lse.data());
    run(call);
    compare("out", x.out, exact, yardstick, magnitudes, width);
    compare_logs(x.lse, exact, yardstick);
  }
  check_intact(tensors);
  char text_of[300];
  std::snprintf(text_of, sizeof(text_of),
                "rows %ld, text %ld, image %ld, heads %ld, kv heads %ld, width %ld, %s, %s, "
                "intervals: %s",
                rows, text, x.image, heads, x.kv_heads, width,
                x.epsilon < 0 ? "plain q" : "normed q", bf16 ? "bfloat16" : "float32",
                INTERVALS[x.intervals]);
  return text_of;
}

// ---- Norm

struct NormProblem {
  bool gated;
  int64_t rows, width;
  float epsilon;
  Tensor residual, branch, gate, weight, sum, normed, inverse_rms;
  Tensor grad_normed, grad_sum, grad_residual, grad_branch, grad_gate, grad_weight;
};

// The norm is that of the sum as it was put out, if it was.
template <class Real, class Round>
Results norm_forward(const NormProblem& x, Round&& round, Results* magnitudes) {
  Results all;
  for (int64_t n = 0; n < x.rows; ++n) {
    std::vector<Real> sum(x.width);
    Real squares = 0;
    for (int64_t i = 0; i < x.width; ++i) {
      const Real residual = x.residual.at(0, 0, n, i);
      sum[i] = residual;
      if (x.gated) {
        const Real gate = std::tanh(Real(x.gate.at(0, 0, 0, 0))), branch = x.branch.at(0, 0, n, i);
        sum[i] = x.sum.at(0, 0, n, i);
        all["sum"].push_back(round(residual + gate * branch));
        if (magnitudes)
          (*magnitudes)["sum"].push_back(std::abs(residual) + std::abs(gate * branch));
      }
      squares += sum[i] * sum[i];
    }
    const Real inverse = 1 / std::sqrt(squares / x.width + Real(x.epsilon));
    all["inverse_rms"].push_back(inverse);
    if (magnitudes) (*magnitudes)["inverse_rms"].push_back(inverse);
    for (int64_t i = 0; i < x.width; ++i) {
      all["normed"].push_back(round(sum[i] * inverse * Real(x.weight.at(0, 0, 0, i))));
      if (magnitudes) (*magnitudes)["normed"].push_back(std::abs(all["normed"].back()));
    }
  }
  return all;
}

template <class Real, class Round>
Results norm_backward(const NormProblem& x, Round&& round, Results* magnitudes) {
  Results all, sizes;
  std::vector<Real> grad_weight(x.width);
  std::vector<double> weight_size(x.width);
  Real grad_gate = 0, gate = x.gated ? std::tanh(Real(x.gate.at(0, 0, 0, 0))) : 0;
  double gate_size = 0;
  for (int64_t n = 0; n < x.rows; ++n) {
    const Real inverse = x.inverse_rms.at(0, 0, n, 0);
    Real c = 0;
    double c_size = 0;
    for (int64_t i = 0; i < x.width; ++i) {
      const Real g = x.grad_normed.at(0, 0, n, i), u = x.residual.at(0, 0, n, i) * inverse;
      c += g * Real(x.weight.at(0, 0, 0, i)) * u;
      c_size += std::abs(g * x.weight.at(0, 0, 0, i) * u);
      grad_weight[i] += g * u;
      weight_size[i] += std::abs(g * u);
    }
    c /= x.width, c_size /= x.width;
    for (int64_t i = 0; i < x.width; ++i) {
      const Real g = x.grad_normed.at(0, 0, n, i) * x.weight.at(0, 0, 0, i);
      const Real u = x.residual.at(0, 0, n, i) * inverse;
      const Real direct = x.gated ? x.grad_sum.at(0, 0, n, i) : 0;
      const Real grad = round(direct + inverse * (g - u * c));
      const double size = std::abs(direct) + inverse * (std::abs(g) + std::abs(u) * c_size);
      all["grad_residual"].push_back(grad);
      sizes["grad_residual"].push_back(size);
      if (!x.gated) continue;
      const Real branch = x.branch.at(0, 0, n, i);
      all["grad_branch"].push_back(round(gate * grad));
      sizes["grad_branch"].push_back(std::abs(gate) * size);
      grad_gate += grad * branch;
      gate_size += std::abs(grad * branch);
    }
  }
  all["grad_weight"].assign(grad_weight.begin(), grad_weight.end());
  all["grad_gate"] = {double(grad_gate * (1 - gate * gate))};
  sizes["grad_weight"] = weight_size;
  sizes["grad_gate"] = {gate_size * (1 - gate * gate)};
  if (magnitudes) *magnitudes = sizes;
  return all;
}

std::string check_norm() {
  NormProblem x;
  const Element element = any_element();
  const bool bf16 = element == Element::bfloat16, backward = between(0, 1);
  x.gated = between(0, 1);
  x.rows = option("rows", size_up_to(300));
  x.width = option("width", 8 * size_up_to(600));
  x.epsilon = 1e-5f;
  const auto matrix = [&] {
    const Tensor made = tensor(element, {1, 1, x.rows, x.width + any_of<int64_t>({0, 0, 8, 64})});
    Tensor view = made;
    view.size[3] = x.width;
    return view;
  };
  const auto vector = [](int64_t size) { return tensor(Element::float32, {1, 1, 1, size}); };
  x.residual = matrix();
  x.residual.fill_normal(any_of({0.01, 1.0, 10.0}));
  x.weight = vector(x.width);
  x.weight.fill_normal(0.3, 1);
  x.inverse_rms = tensor(Element::float32, {1, 1, x.rows, 1});
  if (x.gated) {
    x.branch = matrix();
    x.branch.fill_normal(3);
    x.gate = vector(1);
    x.gate.set(0, 0, 0, 0, any_of({0.0, 0.3, -1.0}));
  }
  const auto identity = [](double y) { return y; };
  const auto rounded = [&](float y) { return bf16 ? bfloat16(y) : y; };
  if (backward) {
    NormProblem plain = x;
    plain.gated = false;
    x.inverse_rms.fill(norm_forward<double>(plain, identity, nullptr).at("inverse_rms"));
    x.grad_normed = matrix();
    x.grad_normed.fill_normal();
    x.grad_residual = matrix().output();
    x.grad_weight = vector(x.width).output();
    if (x.gated) {
      x.grad_sum = matrix();
      x.grad_sum.fill_normal();
      x.grad_branch = matrix().output();
      x.grad_gate = vector(1).output();
    }
  } else {
    x.normed = matrix().output();
    x.inverse_rms.output();
    if (x.gated) x.sum = matrix().output();
  }
  const auto tensors = {&x.residual,   &x.branch,        &x.gate,        &x.weight,
                        &x.sum,        &x.normed,        &x.inverse_rms, &x.grad_normed,
                        &x.grad_sum,   &x.grad_residual, &x.grad_branch, &x.grad_gate,
                        &x.grad_weight};
  for (const Tensor* one : tensors)
    if (one->buffer) one->buffer->remember();
  const auto matrix_of = [](const Tensor& tensor) {
    return tensor.buffer ? tensor.matrix() : Matrix{nullptr, 0};
  };
  const auto floats = [](const Tensor& tensor) {
    return tensor.buffer ? reinterpret_cast<float*>(tensor.data()) : nullptr;
  };
  const Norm problem{
      element,        x.rows,           x.width,  matrix_of(x.residual), matrix_of(x.branch),
      floats(x.gate), floats(x.weight), x.epsilon};
  Results magnitudes, exact, yardstick;
  std::vector<std::pair<const char*, const Tensor*>> outputs;
  if (backward) {
    exact = norm_backward<double>(x, identity, &magnitudes);
    yardstick = norm_backward<float>(x, rounded, nullptr);
    NormBackward call;
    static_cast<Norm&>(call) = problem;
    call.inverse_rms = floats(x.inverse_rms);
    call.grad_normed = matrix_of(x.grad_normed), call.grad_sum = matrix_of(x.grad_sum);
    call.grad_residual = matrix_of(x.grad_residual), call.grad_branch = matrix_of(x.grad_branch);
    call.grad_gate = floats(x.grad_gate), call.grad_weight = floats(x.grad_weight);
    run(call);
    outputs = {{"grad_residual", &x.grad_residual},
               {"grad_branch", &x.grad_branch},
               {"grad_gate", &x.grad_gate},
               {"grad_weight", &x.grad_weight}};
  } else {
    NormForward call;
    static_cast<Norm&>(call) = problem;
    call.sum = matrix_of(x.sum), call.normed = matrix_of(x.normed);
    call.inverse_rms = floats(x.inverse_rms);
    run(call);
    exact = norm_forward<double>(x, identity, &magnitudes);
    yardstick = norm_forward<float>(x, rounded, nullptr);
    outputs = {{"sum", &x.sum}, {"normed", &x.normed}, {"inverse_rms", &x.inverse_rms}};
  }
  for (const auto& [name, tensor] : outputs)
    if (tensor->buffer) compare(name, *tensor, exact, yardstick, magnitudes, tensor->size[3]);
  check_intact(tensors);
  char text_of[200];
  std::snprintf(text_of, sizeof(text_of), "%s, rows %ld, width %ld, %s, %s",
                backward ? "backward" : "forward", x.rows, x.width, x.gated ? "gated" : "plain",
                bf16 ? "bfloat16" : "float32");
  return text_of;
}

}  // namespace

int main(int count, char** arguments) {
  std::string fixed;  // options to repeat for a single case
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i] + 2;
    options[name] = arguments[i + 1];
    if (name != "operation" && name != "cases" && name != "seed")
      fixed += " --" + name + " " + arguments[i + 1];
  }
  std::signal(SIGABRT, [](int) {
    std::printf("ABORTED: %s\n", running.c_str());
    std::fflush(stdout);
  });
  const std::string wanted = options.count("operation") ? options["operation"] : "all";
  const int64_t cases = option("cases", 10), seed = option("seed", 0);
  int64_t failures = 0, run = 0;
  for (const std::string operation : {"forward", "backward", "norm"}) {
    if (wanted != "all" && wanted != operation) continue;
    for (int64_t i = 0; i < cases; ++i, ++run) {
      generator.seed(seed + i);
#ifdef CHECK_CUDA
      emulator::reseed(seed + i);
#endif
      case_failed = false;
      refusal.clear();
      running =
          "--operation " + operation + " --seed " + std::to_string(seed + i) + " --cases 1" + fixed;
      const std::string problem =
          operation == "norm" ? check_norm() : check_attention(operation == "backward");
      if (!refusal.empty()) complain("refused: %s", refusal.c_str());
      if (case_failed || option("verbose", 0))
        std::printf("%s: %s (%s)\n", case_failed ? "FAILED" : "ok", running.c_str(),
                    problem.c_str());
      std::fflush(stdout);
      failures += case_failed;
    }
  }
  std::printf("%ld cases, %ld failed; worst relative error (and part of its limit):", run,
              failures);
  for (const auto& [name, errors] : worst)
    std::printf(" %s %.2g (%.2f)", name.c_str(), errors.first, errors.second);
  std::printf("\n");
  return failures ? 1 : 0;
}
