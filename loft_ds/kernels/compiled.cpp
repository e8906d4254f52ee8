// The two passes over the second moment on x86, for float32: no tile of a (k, l) matrix leaves the registers.
//
// projected_update is a matrix product of six rows [P_i] by a block of columns, in registers, of Khatri-Rao products
// that are built once for many rows; divided there, and multiplied with the values while it is still there. Sums over
// columns are of a vector's lanes first, so their order depends on r and l alone: rows may be split in any way.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros_like.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <memory>
#include <optional>

namespace {

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int64_t LANES = 16, VECTORS = 4;  // with ROWS: 24 sums, 4 operands and one more of 32 registers
inline Vector load(const float* x) { return _mm512_load_ps(x); }
inline void store(float* x, Vector v) { _mm512_store_ps(x, v); }
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector subtract_product(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }   // b where one is NaN
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }  // b where one is NaN
inline Vector about_inverse_root(Vector x) { return _mm512_rsqrt14_ps(x); }
inline Vector about_inverse(Vector x) { return _mm512_rcp14_ps(x); }
inline float sum(Vector x) { return _mm512_reduce_add_ps(x); }
#else
using Vector = __m256;
constexpr int64_t LANES = 8, VECTORS = 2;  // with ROWS: 12 sums, 2 operands and one more of 16 registers
inline Vector load(const float* x) { return _mm256_load_ps(x); }
inline void store(float* x, Vector v) { _mm256_store_ps(x, v); }
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector subtract_product(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector about_inverse_root(Vector x) { return _mm256_rsqrt_ps(x); }
inline Vector about_inverse(Vector x) { return _mm256_rcp_ps(x); }
inline float sum(Vector x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
#endif

constexpr int64_t ROWS = 6, COLUMNS = LANES * VECTORS;
constexpr int64_t PRODUCTS_BYTES = 256 << 10;  // of a thread at a time, half of a usual second cache or less
constexpr int64_t TASK_ROWS = 192;             // a task builds the products anew, for so many rows

struct Aligned {
  explicit Aligned(int64_t count) : memory(new float[count + 16]) {
    const auto place = reinterpret_cast<uintptr_t>(memory.get());
    data = memory.get() + ((64 - place % 64) % 64) / sizeof(float);
  }
  std::unique_ptr<float[]> memory;
  float* data;
};

// One step of Newton's method on the CPU's approximations leaves an error of about a unit in the last place.
inline Vector inverse_root(Vector x) {
  x = smaller(broadcast(FLT_MAX), larger(broadcast(FLT_MIN), x));  // of zero and infinity the step would make NaN
  const Vector w = about_inverse_root(x);
  return w * subtract_product(x * w * broadcast(0.5f), w, broadcast(1.5f));
}
inline Vector inverse(Vector x) {
  x = smaller(broadcast(FLT_MAX), x);
  const Vector w = about_inverse(x);
  return w * subtract_product(x, w, broadcast(2.0f));
}

// sums[i][j] = rows[i] @ block: ROWS rows of count numbers, and count of V vectors, one every stride numbers.
template <int V>
inline void multiply(Vector (&sums)[ROWS][V], const float* const* rows, const float* block, int64_t stride,
                     int64_t count) {
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = broadcast(0.0f);
  for (int64_t t = 0; t < count; ++t, block += stride) {
    Vector operand[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) operand[j] = load(block + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Vector number = broadcast(rows[i][t]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = multiply_add(number, operand[j], sums[i][j]);
    }
  }
}

// The same with bfloat16 operands: words of two neighbours of a row, and of the same two of every column.
#if defined(__AVX512BF16__)
constexpr bool HAS_HALVES = true;
inline void multiply_halves(Vector (&sums)[ROWS][VECTORS], const int32_t* const* rows, const int32_t* block,
                            int64_t count) {
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = broadcast(0.0f);
  for (int64_t t = 0; t < count; ++t, block += COLUMNS) {
    __m512i operand[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) operand[j] = _mm512_load_si512(block + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const __m512i word = _mm512_set1_epi32(rows[i][t]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j)
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)word, (__m512bh)operand[j]);
    }
  }
}
// Rounds rows [t] and [t + 1] of (count, COLUMNS) into one of words, in place: of blocks that follow each other.
inline void halve(float* products, int64_t count, int64_t blocks) {
  float* words = products;
  for (int64_t block = 0; block < blocks; ++block, products += count * COLUMNS)
    for (int64_t t = 0; t < count; t += 2)
      for (int64_t j = 0; j < COLUMNS; j += LANES, words += LANES) {
        const float* low = products + t * COLUMNS + j;
        const __m512i below = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(low)));
        const Vector next = t + 1 < count ? load(low + COLUMNS) : broadcast(0.0f);
        const __m512i above = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(next));
        _mm512_store_si512(words, _mm512_or_si512(below, _mm512_slli_epi32(above, 16)));
      }
}
// One row of count numbers, of which the one after the last may be read as zero.
inline void halve_row(const float* row, int32_t* words, int64_t count) {
  for (int64_t t = 0; t < count; t += LANES) {
    const __mmask16 some = count - t >= LANES ? 0xFFFF : (1u << (count - t)) - 1;
    _mm256_storeu_si256((__m256i*)(words + t / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, row + t)));
  }
}
#else
constexpr bool HAS_HALVES = false;
inline void multiply_halves(Vector (&)[ROWS][VECTORS], const int32_t* const*, const int32_t*, int64_t) {}
inline void halve(float*, int64_t, int64_t) {}
inline void halve_row(const float*, int32_t*, int64_t) {}
#endif

inline float to_float(at::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(float x) { return x; }

// Columns [start, start + columns) of (r, l) in blocks (r, COLUMNS). After the last come zeros, or the last again: what
// is finite there is finite after it, and times a value of zero it is nothing.
void lay_out(const float* from, float* blocks, int64_t r, int64_t l, int64_t start, int64_t columns, bool again) {
  for (int64_t block = 0; block < columns; block += COLUMNS)
    for (int64_t a = 0; a < r; ++a, blocks += COLUMNS) {
      const int64_t here = std::clamp<int64_t>(l - start - block, 0, COLUMNS);
      std::copy_n(from + a * l + start + block, here, blocks);
      std::fill(blocks + here, blocks + COLUMNS, again ? from[a * l + l - 1] : 0.0f);
    }
}

void build_products(const float* keys, float* products, int64_t r, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block, keys += r * COLUMNS)
    for (int64_t s = 0; s < r; ++s)
      for (int64_t t = s; t < r; ++t, products += COLUMNS)
        for (int64_t j = 0; j < COLUMNS; j += LANES) {
          const Vector product = load(keys + s * COLUMNS + j) * load(keys + t * COLUMNS + j);
          store(products + j, s == t ? product : product + product);
        }
}

template <typename Stored>
void project_rows(const float* momentum, const Stored* packed, const float* keys, const float* values, float* out,
                  int64_t first, int64_t last, int64_t l, int64_t r, float eps, float bound, bool halves) {
  const int64_t p = r * (r + 1) / 2, words = (p + 1) / 2;
  const int64_t most = std::max<int64_t>(1, PRODUCTS_BYTES / (p * COLUMNS * 4)) * COLUMNS;
  const int64_t columns = std::min(most, (l + COLUMNS - 1) / COLUMNS * COLUMNS);
  Aligned products(p * columns), key_blocks(r * columns), value_blocks(r * columns), totals(ROWS * r * LANES);
  Aligned roots(ROWS * COLUMNS), converted(std::is_same_v<Stored, float> ? 0 : ROWS * p);
  Aligned halved(halves ? ROWS * (words + LANES) : 0);
  const Vector low = broadcast(-bound), high = broadcast(bound);
  const Vector one = broadcast(1.0f), epsilon = broadcast(eps);
  for (int64_t start = 0; start < l; start += columns) {
    lay_out(keys, key_blocks.data, r, l, start, columns, true);
    lay_out(values, value_blocks.data, r, l, start, columns, false);
    const int64_t blocks = std::min(columns, (l - start + COLUMNS - 1) / COLUMNS * COLUMNS) / COLUMNS;
    build_products(key_blocks.data, products.data, r, blocks);
    if (halves) halve(products.data, p, blocks);
    for (int64_t row = first; row < last; row += ROWS) {
      const float *of_packed[ROWS], *of_momentum[ROWS];
      int32_t* of_halves[ROWS];
      for (int64_t i = 0; i < ROWS; ++i) {
        const int64_t here = std::min(row + i, last - 1);  // the last row again, whose result is not taken
        of_momentum[i] = momentum + here * r;
        if constexpr (std::is_same_v<Stored, float>) {
          of_packed[i] = packed + here * p;
        } else {
          of_packed[i] = converted.data + i * p;
          for (int64_t t = 0; t < p; ++t) converted.data[i * p + t] = to_float(packed[here * p + t]);
        }
        of_halves[i] = reinterpret_cast<int32_t*>(halved.data) + i * (words + LANES);
        if (halves) halve_row(of_packed[i], of_halves[i], p);
      }
      std::fill_n(totals.data, ROWS * r * LANES, 0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        Vector sums[ROWS][VECTORS];
        if (halves)
          multiply_halves(sums, of_halves, reinterpret_cast<int32_t*>(products.data) + block * words * COLUMNS, words);
        else
          multiply(sums, of_packed, products.data + block * p * COLUMNS, COLUMNS, p);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; ++j)
            store(roots.data + i * COLUMNS + j * LANES, inverse_root(sums[i][j]));
        multiply(sums, of_momentum, key_blocks.data + block * r * COLUMNS, COLUMNS, r);
        // See tiled._update_tiles for the form of the quotient.
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; ++j) {
            const Vector w = load(roots.data + i * COLUMNS + j * LANES);
            const Vector quotient = smaller(high, larger(low, sums[i][j] * w));
            sums[i][j] = quotient * inverse(multiply_add(epsilon, w, one));
          }
        const float* value = value_blocks.data + block * r * COLUMNS;
        for (int64_t a = 0; a < r; ++a, value += COLUMNS)
#pragma GCC unroll 6
          for (int i = 0; i < ROWS; ++i) {
            float* place = totals.data + (a * ROWS + i) * LANES;
            Vector total = load(place);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) total = multiply_add(sums[i][j], load(value + j * LANES), total);
            store(place, total);
          }
      }
      for (int64_t i = 0; i < std::min(ROWS, last - row); ++i)
        for (int64_t a = 0; a < r; ++a) out[(row + i) * r + a] += sum(load(totals.data + (a * ROWS + i) * LANES));
    }
  }
}

// storage.round_stochastically, the same bits.
inline at::BFloat16 round_stochastically(float value, uint32_t seed) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t noise = bits ^ seed;
  noise = (noise ^ noise >> 16) * 0x7FEB352D;
  noise = (noise ^ noise >> 15) * 0x846CA68B;
  noise ^= noise >> 16;
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  // Of what is not finite, NaN stays NaN although the upper half alone might be an infinity's.
  const uint32_t rounded = finite ? bits + (noise & 0xFFFF) : value != value ? 0x7FC00000 : bits;
  return at::BFloat16(static_cast<uint16_t>(rounded >> 16), at::BFloat16::from_bits());
}
inline void keep(float& place, float value, uint32_t) { place = value; }
inline void keep(at::BFloat16& place, float value, uint32_t seed) { place = round_stochastically(value, seed); }

struct Weights {
  float decay, gradient, pending;
};

// Gives take(i, j, sum) each vector of left @ right, of which both are (r, wide) and left's rows have r numbers.
template <int V, typename Take>
inline void multiply_part(const float* const* rows, const float* right, int64_t i, int64_t j, int64_t r, int64_t wide,
                          const Take& take) {
  Vector sums[ROWS][V];
  multiply(sums, rows, right + j, wide, r);
  for (int64_t a = 0; a < std::min(ROWS, r - i); ++a)
    for (int64_t b = 0; b < V; ++b) take(i + a, j + b * LANES, sums[a][b]);
}
template <typename Take>
inline void multiply_square(const float* left, const float* right, int64_t r, int64_t wide, bool upper,
                            const Take& take) {
  for (int64_t i = 0; i < r; i += ROWS) {
    const float* rows[ROWS];
    for (int64_t a = 0; a < ROWS; ++a) rows[a] = left + std::min(i + a, r - 1) * wide;
    int64_t j = upper ? i / LANES * LANES : 0;
    for (; j + COLUMNS <= wide; j += COLUMNS) multiply_part<VECTORS>(rows, right, i, j, r, wide, take);
    for (; j < wide; j += LANES) multiply_part<1>(rows, right, i, j, r, wide, take);
  }
}

template <typename Stored>
void accumulate_rows(Stored* packed, const float* gradient, const float* pending, const float* rotation, int64_t first,
                     int64_t last, int64_t r, Weights weights, uint32_t seed) {
  const int64_t p = r * (r + 1) / 2, wide = (r + LANES - 1) / LANES * LANES;
  Aligned full(r * wide), half(r * wide), turn(r * wide), turned(r * wide), g(wide), h(wide);
  for (Aligned* each : {&full, &half, &turn, &turned}) std::fill_n(each->data, r * wide, 0.0f);
  for (Aligned* each : {&g, &h}) std::fill_n(each->data, wide, 0.0f);
  if (rotation)
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) turn.data[i * wide + j] = turned.data[j * wide + i] = rotation[i * r + j];
  for (int64_t row = first; row < last; ++row) {
    Stored* here = packed + row * p;
    std::copy_n(gradient + row * r, r, g.data);
    if (pending) std::copy_n(pending + row * r, r, h.data);
    for (int64_t i = 0, t = 0; i < r; ++i)
      for (int64_t j = i; j < r; ++j, ++t) full.data[i * wide + j] = full.data[j * wide + i] = to_float(here[t]);
    const auto add = [&](int64_t i, int64_t j, Vector square) {
      Vector total = square * broadcast(weights.decay);
      if (pending) total = multiply_add(broadcast(weights.pending * h.data[i]), load(h.data + j), total);
      total = multiply_add(broadcast(weights.gradient * g.data[i]), load(g.data + j), total);
      store(full.data + i * wide + j, total);
    };
    if (rotation) {
      multiply_square(full.data, turn.data, r, wide, false,
                      [&](int64_t i, int64_t j, Vector sum) { store(half.data + i * wide + j, sum); });
      multiply_square(turned.data, half.data, r, wide, true, add);
    } else {
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = i / LANES * LANES; j < wide; j += LANES) add(i, j, load(full.data + i * wide + j));
    }
    for (int64_t i = 0, t = 0; i < r; ++i)
      for (int64_t j = i; j < r; ++j, ++t) keep(here[t], full.data[i * wide + j], seed);
  }
}

// A function of (pair, first row, last row) for all rows of all pairs, on torch's threads.
template <typename Function>
void for_all_rows(int64_t pairs, int64_t rows, const Function& function) {
  const int64_t tasks = (rows + TASK_ROWS - 1) / TASK_ROWS;
  at::parallel_for(0, pairs * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tasks * TASK_ROWS;
      function(task / tasks, first, std::min(first + TASK_ROWS, rows));
    }
  });
}

at::Tensor projected_update(const at::Tensor& momentum, at::TensorList packed, const at::Tensor& keys,
                            const at::Tensor& values, double eps, double bound, bool halves) {
  const int64_t k = momentum.size(1), r = momentum.size(2), l = keys.size(2);
  at::Tensor out = at::zeros_like(momentum);
  const auto run = [&](auto stored) {
    using Stored = decltype(stored);
    for_all_rows(momentum.size(0), k, [&](int64_t pair, int64_t first, int64_t last) {
      project_rows(momentum.const_data_ptr<float>() + pair * k * r, packed[pair].const_data_ptr<Stored>(),
                   keys.const_data_ptr<float>() + pair * r * l, values.const_data_ptr<float>() + pair * r * l,
                   out.mutable_data_ptr<float>() + pair * k * r, first, last, l, r, eps, bound,
                   halves && HAS_HALVES);
    });
  };
  packed[0].scalar_type() == at::kFloat ? run(0.0f) : run(at::BFloat16());
  return out;
}

void accumulate_second_moment_(at::TensorList packed, const at::Tensor& gradient,
                               const std::optional<at::Tensor>& pending, const std::optional<at::Tensor>& rotation,
                               double decay, double gradient_weight, double pending_weight, int64_t seed) {
  const int64_t k = gradient.size(1), r = gradient.size(2);
  const Weights weights{static_cast<float>(decay), static_cast<float>(gradient_weight),
                        static_cast<float>(pending_weight)};
  const auto run = [&](auto stored) {
    using Stored = decltype(stored);
    for_all_rows(gradient.size(0), k, [&](int64_t pair, int64_t first, int64_t last) {
      accumulate_rows(packed[pair].mutable_data_ptr<Stored>(), gradient.const_data_ptr<float>() + pair * k * r,
                      pending ? pending->const_data_ptr<float>() + pair * k * r : nullptr,
                      rotation ? rotation->const_data_ptr<float>() + pair * r * r : nullptr, first, last, r, weights,
                      static_cast<uint32_t>(seed));
    });
  };
  packed[0].scalar_type() == at::kFloat ? run(0.0f) : run(at::BFloat16());
}

}  // namespace

// The name is expanded on the way: torch 2.9's own macro takes it as it is written.
#define DEFINE(name, library) TORCH_LIBRARY(name, library)
#define IMPLEMENT(name, device, library) TORCH_LIBRARY_IMPL(name, device, library)

DEFINE(LIBRARY, library) {
  library.def(
      "projected_update(Tensor momentum, Tensor[] packed, Tensor keys, Tensor values, float eps, float bound, bool "
      "halves) -> Tensor");
  library.def(
      "accumulate_second_moment_(Tensor(a!)[] packed, Tensor gradient, Tensor? pending, Tensor? rotation, float decay, "
      "float gradient_weight, float pending_weight, int seed) -> ()");
}

IMPLEMENT(LIBRARY, CPU, library) {
  library.impl("projected_update", &projected_update);
  library.impl("accumulate_second_moment_", &accumulate_second_moment_);
}
