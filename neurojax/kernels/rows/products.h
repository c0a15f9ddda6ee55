// A few rows of numbers times matrices that are plain numbers, int8 or grouped integers, on a CPU.
//
// Weights are read once for all rows. Every result is summed in one fixed order, so that its bits
// depend neither on the instruction set nor on how many rows, channels or threads there are.
// reference.py has the definitions.

#pragma once

#include "../native/pool.h"

// Loops whose arrays are meant to be registers.
#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int kSum = 16;          // partial sums of a result
constexpr int kParts = kSum / kLanes;
constexpr int kChannels = 16;     // channels of a unit, where a channel's weights are contiguous
constexpr int kAtOnce = 4;        // of them, that a kernel of floats multiplies by
constexpr int kColumns = 64;      // channels of a tile, where they are neighbours in memory
constexpr int64_t kMostTiles = 8;  // of a unit, which reads long runs of memory if it has several
constexpr int64_t kUnits = 12;     // of a weight at least, so that threads end at one time
constexpr int kDepth = 64;        // elements that are summed before they are added to the others
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kMicroRows = 4;     // rows of x multiplied at once
constexpr int kAhead = 16;        // channels that memory is asked for before they are wanted
constexpr int kBytes = 64;        // int8 weights multiplied at once; rows of x are padded to it
constexpr int64_t kBlockRows = 128;  // rows of x that a cache holds
constexpr int64_t kThreadWork = 1 << 16;  // bytes of weights, times a few rows, worth waking a thread

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr bool kHasDigits = true;
#else
constexpr bool kHasDigits = false;
#endif

enum Kind : int64_t { kRows, kMatrix, kInt8, kGrouped };
enum Minima : int64_t { kNone, kMinimum, kZero };
enum Float8 : int64_t { kIntegers, kE4M3, kE5M2 };
constexpr int kNumbers = 10;  // that describe a weight: kind, n, k, layers, then those of a Grouped

struct Numbers {
  const uint8_t* data = nullptr;
  ffi::DataType type;
  const uint8_t* at(int64_t i) const { return data + i * bytes_of(type); }
};

struct Weight {
  Kind kind;
  int64_t n, k;
  Numbers values;  // [n, k], or [k, n] of a matrix; int8 codes
  Numbers planes[2], scales, parents, minima, minima_parents;
  int64_t group, offset, has, float8, bits[2];
  int64_t first_unit;
  float* out;  // [m, n]

  int64_t unit_channels() const {
    if (kind != kMatrix) return kChannels;
    return kColumns * std::clamp<int64_t>(n / (kColumns * kUnits), 1, kMostTiles);
  }
  int64_t units() const { return (n + unit_channels() - 1) / unit_channels(); }
};

// The rows of x, in the form that kernels read.
struct X {
  int64_t m = 0, k = 0, padded = 0;
  Buffer<float> floats;    // [m, padded]
  Buffer<int8_t> digits;   // [m, digit_count, padded], the lowest first
  Buffer<uint32_t> levels;  // [m, padded]
  std::vector<uint32_t> excess;  // [m], 128 times the sum of a row's levels
  std::vector<float> steps;      // [m]
  int digit_count = 0;

  void allocate(const uint8_t* data, ffi::DataType type) {
    data_ = data, type_ = type;
    padded = (k + kBytes - 1) / kBytes * kBytes;
    floats.at_least(m * padded);
  }

  // Rows will be rounded to integers in -levels .. levels.
  void allocate_levels(float most_levels) {
    most_levels_ = most_levels;
    digit_count = most_levels <= 32639 ? 2 : 3;
    excess.resize(m), steps.resize(m);
    kHasDigits ? (void)digits.at_least(m * digit_count * padded) : (void)levels.at_least(m * padded);
  }

  void read(int64_t row) {
    float* out = floats.data() + row * padded;
    to_floats(data_ + row * k * bytes_of(type_), type_, k, out);
    std::fill(out + k, out + padded, 0.0f);
    if (digit_count > 0) quantize(row);
  }

 private:
  void quantize(int64_t row) {
    const float* x = floats.data() + row * padded;
    uint32_t most = 0;
    for (int64_t j = 0; j < padded; ++j) most = std::max(most, bits_of<uint32_t>(x[j]) & 0x7fffffff);
    float step = bits_of<float>(most) * (1.0f / most_levels_);
    float inverse = step > 0 ? 1.0f / step : 0.0f;
    // Added to 1.5 * 2**23, a float is rounded to an integer that stands in its lowest bits.
    auto level = [=](int64_t j) {
      return bits_of<uint32_t>(x[j] * inverse + 0x1.8p23f) - bits_of<uint32_t>(0x1.8p23f);
    };
    uint32_t sum = 0;
    for (int64_t j = 0; j < padded; ++j) sum += level(j);
    excess[row] = sum << 7;
    steps[row] = most < 0x7f800000 ? step : NAN;
    if (!kHasDigits) {
      uint32_t* out = levels.data() + row * padded;
      for (int64_t j = 0; j < padded; ++j) out[j] = level(j);
      return;
    }
    // Of base 256, in -128 .. 127.
    int8_t* out = digits.data() + row * digit_count * padded;
    for (int64_t j = 0; j < padded; ++j) out[j] = static_cast<int8_t>(level(j));
    out += padded;
    for (int64_t j = 0; j < padded; ++j) out[j] = static_cast<int8_t>(level(j) + 0x80 >> 8);
    if (digit_count == 2) return;
    out += padded;
    for (int64_t j = 0; j < padded; ++j) out[j] = static_cast<int8_t>(level(j) + 0x8080 >> 16);
  }

  const uint8_t* data_;
  ffi::DataType type_;
  float most_levels_;
};

// Sums of kSum lanes over contiguous weights, for channels w and rows of x. Lane i has elements
// 16j + i, one after the other.
template <int kCount, int kRowCount>
void dot(const float* const* w, const float* x, int64_t padded, float* out, int64_t stride) {
  Floats sum[kCount][kRowCount][kParts];
  UNROLL
  for (int i = 0; i < kCount * kRowCount * kParts; ++i) (&sum[0][0][0])[i] = fill(0.0f);
  for (int64_t k = 0; k < padded; k += kSum) {
    UNROLL
    for (int p = 0; p < kParts; ++p) {
      Floats weight[kCount];
      UNROLL
      for (int c = 0; c < kCount; ++c) weight[c] = load(w[c] + k + p * kLanes);
      UNROLL
      for (int r = 0; r < kRowCount; ++r) {
        Floats value = load(x + r * padded + k + p * kLanes);
        UNROLL
        for (int c = 0; c < kCount; ++c) sum[c][r][p] = fuse(value, weight[c], sum[c][r][p]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < kRowCount; ++r) {
    UNROLL
    for (int c = 0; c < kCount; ++c) out[r * stride + c] = sum_16(sum[c][r]);
  }
}

// kColumns columns of kDepth or fewer rows of weights times rows of x, added to totals.
template <int kRowCount>
void multiply_columns(const float* w, int64_t stride, int64_t depth, const float* x, int64_t padded,
                      float* totals, int64_t totals_stride) {
  for (int first = 0; first < kColumns; first += kTileVectors * kLanes) {
    Floats sum[kRowCount][kTileVectors];
    UNROLL
    for (int i = 0; i < kRowCount * kTileVectors; ++i) (&sum[0][0])[i] = fill(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      Floats weight[kTileVectors];
      UNROLL
      for (int v = 0; v < kTileVectors; ++v) weight[v] = load(w + k * stride + first + v * kLanes);
      UNROLL
      for (int r = 0; r < kRowCount; ++r) {
        Floats value = fill(x[r * padded + k]);
        UNROLL
        for (int v = 0; v < kTileVectors; ++v) sum[r][v] = fuse(value, weight[v], sum[r][v]);
      }
    }
    UNROLL
    for (int r = 0; r < kRowCount; ++r) {
      UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        float* total = totals + r * totals_stride + first + v * kLanes;
        store(total, add(load(total), sum[r][v]));
      }
    }
  }
}

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

// Exact sums modulo 2**32 of int8 weights plus 128 times digits, 256 ** digit each, to
// out[row * kChannels + channel].
template <int kCount, int kRowCount, int kDigits>
[[gnu::noinline]] void dot_int8(const uint8_t* w, int64_t k, const int8_t* digits, int64_t padded,
                                uint32_t* out) {
  constexpr int kRowDigits = kRowCount * kDigits;
  __m512i sum[kCount * kRowDigits];
  UNROLL
  for (int i = 0; i < kCount * kRowDigits; ++i) sum[i] = _mm512_setzero_si512();
  auto step = [&](int64_t i, __mmask64 mask) __attribute__((always_inline)) {
    __m512i weight[kCount];
    UNROLL
    for (int c = 0; c < kCount; ++c) {
      // With several rows, sums take longer than memory and it would idle meanwhile.
      if (kRowCount > 1) __builtin_prefetch(w + (c + kAhead) * k + i, 0, 2);
      __m512i codes = _mm512_maskz_loadu_epi8(mask, w + c * k + i);
      weight[c] = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
    }
    UNROLL
    for (int j = 0; j < kRowDigits; ++j) {
      __m512i value = _mm512_load_si512(digits + j * padded + i);
      UNROLL
      for (int c = 0; c < kCount; ++c) {
        // An intrinsic whose sums GCC 12 would keep in memory, were there more than a dozen.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[c * kRowDigits + j]) : "v"(weight[c]), "v"(value));
      }
    }
  };
  int64_t i = 0;
  for (; i + kBytes <= k; i += kBytes) step(i, ~__mmask64{0});
  if (i < k) step(i, (__mmask64{1} << (k - i)) - 1);
  UNROLL
  for (int r = 0; r < kRowCount; ++r) {
    UNROLL
    for (int c = 0; c < kCount; ++c) {
      __m512i all = sum[c * kRowDigits + r * kDigits];
      UNROLL
      for (int d = 1; d < kDigits; ++d) {
        __m512i part = sum[c * kRowDigits + r * kDigits + d];
        all = _mm512_add_epi32(all, _mm512_slli_epi32(part, 8 * d));
      }
      out[r * kChannels + c] = static_cast<uint32_t>(_mm512_reduce_add_epi32(all));
    }
  }
}

template <int kDigits>
void sums_int8(const uint8_t* w, int64_t channels, int64_t k, const X& x, int64_t m, int64_t count,
               uint32_t* out) {
  auto run = [&](auto kernel, int64_t c, int64_t r) {
    const int8_t* digits = x.digits.data() + (m + r) * kDigits * x.padded;
    kernel(w + c * k, k, digits, x.padded, out + r * kChannels + c);
  };
  int64_t c = 0;
  if (count == 1) {
    for (; c + 8 <= channels; c += 8) run(dot_int8<8, 1, kDigits>, c, 0);
  }
  for (; c + 4 <= channels; c += 4) {
    int64_t r = 0;
    for (; r + 2 <= count; r += 2) run(dot_int8<4, 2, kDigits>, c, r);
    if (r < count) run(dot_int8<4, 1, kDigits>, c, r);
  }
  for (; c < channels; ++c) {
    for (int64_t r = 0; r < count; ++r) run(dot_int8<1, 1, kDigits>, c, r);
  }
  for (int64_t r = 0; r < count; ++r) {
    for (c = 0; c < channels; ++c) out[r * kChannels + c] -= x.excess[m + r];
  }
}

void sums_int8(const uint8_t* w, int64_t channels, int64_t k, const X& x, int64_t m, int64_t count,
               uint32_t* out) {
  x.digit_count == 2 ? sums_int8<2>(w, channels, k, x, m, count, out)
                     : sums_int8<3>(w, channels, k, x, m, count, out);
}

#else

void sums_int8(const uint8_t* w, int64_t channels, int64_t k, const X& x, int64_t m, int64_t count,
               uint32_t* out) {
  for (int64_t c = 0; c < channels; ++c) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(w + c * k);
    for (int64_t r = 0; r < count; ++r) {
      const uint32_t* levels = x.levels.data() + (m + r) * x.padded;
      uint32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += static_cast<uint32_t>(int32_t{codes[i]}) * levels[i];
      out[r * kChannels + c] = sum;
    }
  }
}

#endif

float from_float8(uint8_t code, int64_t kind) {
  if (kind == kE5M2) return from_float16(code << 8);
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float magnitude = exponent == 15 && mantissa == 7 ? NAN
                    : exponent == 0                 ? mantissa * 0x1p-9f
                                    : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
  return std::copysign(magnitude, code & 128 ? -1.0f : 1.0f);
}

// What one thread works with.
class Worker {
 public:
  // Rows begin .. end of x times the channels of a unit, from n on.
  void multiply(const X& x, int64_t begin, int64_t end, const Weight& w, int64_t n) {
    int64_t channels = std::min(w.unit_channels(), w.n - n);
    switch (w.kind) {
      case kMatrix: return columns(x, begin, end, w, n, channels);
      case kInt8: return int8(x, begin, end, w, n, channels);
      default: return rows(x, begin, end, w, n, channels);
    }
  }

 private:
  void rows(const X& x, int64_t begin, int64_t end, const Weight& w, int64_t n, int64_t channels) {
    const float* values = x.floats.data();
    for (int64_t c = 0; c < channels; c += kAtOnce) {
      int64_t count = std::min<int64_t>(kAtOnce, channels - c);
      const float* from[kAtOnce];
      for (int64_t i = 0; i < kAtOnce; ++i) {
        from[i] = i < count ? weights(w, n + c + i, x.padded, i) : from[0];
      }
      for (int64_t m = begin; m < end; m += kMicroRows) {
        float y[kMicroRows * kAtOnce];
        int64_t rows = std::min<int64_t>(kMicroRows, end - m);
        constexpr decltype(&dot<kAtOnce, 1>) kernels[] = {dot<kAtOnce, 1>, dot<kAtOnce, 2>,
                                                          dot<kAtOnce, 3>, dot<kAtOnce, 4>};
        kernels[rows - 1](from, values + m * x.padded, x.padded, y, kAtOnce);
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(y + r * kAtOnce, count, w.out + (m + r) * w.n + n + c);
        }
      }
    }
  }

  // The weights of a channel as floats, padded with zeros.
  const float* weights(const Weight& w, int64_t n, int64_t padded, int64_t slot) {
    if (w.kind == kRows && w.values.type == ffi::DataType::F32 && w.k == padded) {
      return reinterpret_cast<const float*>(w.values.at(n * w.k));
    }
    float* out = floats_.at_least(padded * kAtOnce) + slot * padded;
    std::fill(out + w.k, out + padded, 0.0f);
    if (w.kind == kRows) {
      to_floats(w.values.at(n * w.k), w.values.type, w.k, out);
    } else {
      dequantize(w, n, out);
    }
    return out;
  }

  void dequantize(const Weight& w, int64_t n, float* out) {
    const uint8_t* codes = unpacked(w, n);
    int64_t groups = w.k / w.group;
    const float* scales = spread(w.scales, w.parents, n, groups, w.k, scales_);
    const float* minima = nullptr;
    if (w.has == kMinimum) minima = spread(w.minima, w.minima_parents, n, groups, w.k, minima_);
    if (w.float8 != kIntegers) {
      for (int64_t k = 0; k < w.k; ++k) out[k] = float8(w.float8)[codes[k]] * scales[k / w.group];
      return;
    }
    const uint8_t* zeros = w.has == kZero ? w.minima.at(n * groups) : nullptr;
    minima ? scale_groups<true>(w, codes, zeros, scales, minima, groups, out)
           : scale_groups<false>(w, codes, zeros, scales, minima, groups, out);
  }

  template <bool kHasMinima>
  static void scale_groups(const Weight& w, const uint8_t* codes, const uint8_t* zeros,
                           const float* scales, const float* minima, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; ++g) {
      int less = static_cast<int>(w.offset) + (zeros ? zeros[g] : 0);
      Floats scale = fill(scales[g]), minimum = fill(kHasMinima ? minima[g] : 0.0f);
      for (const uint8_t* end = codes + w.group; codes < end; codes += kLanes, out += kLanes) {
        Floats value = ::multiply(from_bytes(codes, less), scale);
        store(out, kHasMinima ? add(value, minimum) : value);
      }
    }
  }

  static const float* float8(int64_t kind) {
    static const std::vector<float> tables = [] {
      std::vector<float> all;
      for (int64_t kind : {kE4M3, kE5M2}) {
        for (int i = 0; i < 256; ++i) all.push_back(from_float8(static_cast<uint8_t>(i), kind));
      }
      return all;
    }();
    return tables.data() + (kind - kE4M3) * 256;
  }

  // A scale for each group, times that of the groups' parent.
  const float* spread(const Numbers& scales, const Numbers& parents, int64_t n, int64_t groups,
                      int64_t k, Buffer<float>& to) {
    constexpr int64_t kParent = 256;
    float* out = to.at_least(groups);
    to_floats(scales.at(n * groups), scales.type, groups, out);
    if (parents.data == nullptr) return out;
    int64_t count = k / kParent, children = groups / count;
    float* above = parents_.at_least(count);
    to_floats(parents.at(n * count), parents.type, count, above);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t g = p * children; g < (p + 1) * children; ++g) out[g] *= above[p];
    }
    return out;
  }

  // A byte for each code.
  const uint8_t* unpacked(const Weight& w, int64_t n) {
    if (w.bits[0] == 8) return w.planes[0].at(n * w.k);
    uint8_t* codes = codes_.at_least(w.k);
    for (int p = 0, low = 0; p < 2 && w.bits[p] > 0; low += w.bits[p++]) {
      int64_t bytes = w.k * w.bits[p] / 8;
      const uint8_t* plane = w.planes[p].at(n * bytes);
      uint64_t mask = ((1u << w.bits[p]) - 1) * 0x0101010101010101u;
      for (int64_t position = 0; position < 8 / w.bits[p]; ++position) {
        uint8_t* out = codes + position * bytes;
        int shift = static_cast<int>(w.bits[p] * position);
        if (p == 0) {
          each_8(bytes, plane, out, [=](uint64_t a, uint64_t) { return a >> shift & mask; });
        } else {
          each_8(bytes, plane, out,
                 [=](uint64_t a, uint64_t b) { return b | (a >> shift & mask) << low; });
        }
      }
    }
    return codes;
  }

  template <typename F>
  static void each_8(int64_t bytes, const uint8_t* from, uint8_t* to, F f) {
    for (int64_t i = 0; i < bytes; i += 8) {
      uint64_t a, b;
      std::memcpy(&a, from + i, 8), std::memcpy(&b, to + i, 8);
      b = f(a, b);
      std::memcpy(to + i, &b, 8);
    }
  }

  void columns(const X& x, int64_t begin, int64_t end, const Weight& w, int64_t n,
               int64_t channels) {
    const float* values = x.floats.data();
    int64_t width = w.unit_channels();
    float* totals = totals_.at_least((end - begin) * width);
    std::fill_n(totals, (end - begin) * width, 0.0f);
    for (int64_t k = 0; k < w.k; k += kDepth) {
      int64_t depth = std::min<int64_t>(kDepth, w.k - k);
      for (int64_t c = 0; c < channels; c += kColumns) {
        // What comes next: the tile on the right, or the first one of the rows below.
        int64_t ahead_k = c + kColumns < channels ? k : k + kDepth;
        int64_t ahead_n = c + kColumns < channels ? n + c + kColumns : n;
        prefetch(w, ahead_k, std::min<int64_t>(kDepth, w.k - ahead_k), ahead_n);
        int64_t stride = w.n;
        const float* from = tile(w, k, depth, n + c, std::min<int64_t>(kColumns, channels - c), stride);
        for (int64_t m = begin; m < end; m += kMicroRows) {
          constexpr decltype(&multiply_columns<1>) kernels[] = {
              multiply_columns<1>, multiply_columns<2>, multiply_columns<3>, multiply_columns<4>};
          kernels[std::min<int64_t>(kMicroRows, end - m) - 1](
              from, stride, depth, values + m * x.padded + k, x.padded,
              totals + (m - begin) * width + c, width);
        }
      }
    }
    for (int64_t m = begin; m < end; ++m) {
      std::copy_n(totals + (m - begin) * width, channels, w.out + m * w.n + n);
    }
  }

  static void prefetch(const Weight& w, int64_t k, int64_t depth, int64_t n) {
    int64_t bytes = kColumns * bytes_of(w.values.type);
    for (int64_t i = 0; i < depth; ++i) {
      const uint8_t* from = w.values.at((k + i) * w.n + n);
      for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(from + b, 0, 1);
    }
  }

  // Rows k .. k + depth of channels from n on as floats, `stride` apart.
  const float* tile(const Weight& w, int64_t k, int64_t depth, int64_t n, int64_t channels,
                    int64_t& stride) {
    if (w.values.type == ffi::DataType::F32 && channels == kColumns) {
      return reinterpret_cast<const float*>(w.values.at(k * w.n + n));
    }
    float* block = floats_.at_least(kDepth * kColumns);
    for (int64_t i = 0; i < depth; ++i) {
      to_floats(w.values.at((k + i) * w.n + n), w.values.type, channels, block + i * kColumns);
    }
    stride = kColumns;
    return block;
  }

  void int8(const X& x, int64_t begin, int64_t end, const Weight& w, int64_t n, int64_t channels) {
    float scales[kChannels];
    to_floats(w.scales.at(n), w.scales.type, channels, scales);
    constexpr int64_t kBlock = 16;
    uint32_t sums[kBlock * kChannels];
    for (int64_t m = begin; m < end; m += kBlock) {
      int64_t count = std::min(kBlock, end - m);
      sums_int8(w.values.at(n * w.k), channels, w.k, x, m, count, sums);
      for (int64_t r = 0; r < count; ++r) {
        float* out = w.out + (m + r) * w.n + n;
        for (int64_t c = 0; c < channels; ++c) {
          float sum = static_cast<float>(static_cast<int32_t>(sums[r * kChannels + c]));
          out[c] = sum * (x.steps[m + r] * scales[c]);
        }
      }
    }
  }

  Buffer<float> floats_, scales_, minima_, parents_, totals_;
  Buffer<uint8_t> codes_;
};

}  // namespace
