// Numbers as buffers hold them, and memory that threads keep.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kLine = 64;  // bytes that memory moves at once

// Memory that a thread keeps from call to call.
template <typename T>
class Buffer {
 public:
  T* at_least(int64_t count) {
    size_t lines = (count * sizeof(T) + kLine - 1) / kLine;
    if (lines_.size() < lines) lines_.resize(lines);
    return data();
  }
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }

 private:
  struct alignas(kLine) Line {
    char bytes[kLine];
  };
  std::vector<Line> lines_;
};

template <typename To, typename From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_float16(uint16_t half) {
  uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ffu;
  if (exponent == 0) {
    return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, bits_of<float>(sign | 1u));
  }
  return bits_of<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

inline int64_t bytes_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return 4;
    case ffi::DataType::F16:
    case ffi::DataType::BF16: return 2;
    default: return 1;
  }
}

// `count` numbers of float32, float16, bfloat16, int8 or uint8.
inline void to_floats(const uint8_t* source, ffi::DataType type, int64_t count, float* out) {
  if (type == ffi::DataType::F32) {
    std::memcpy(out, source, count * sizeof(float));
    return;
  }
  if (type == ffi::DataType::S8) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int8_t>(source[i]);
    return;
  }
  if (type == ffi::DataType::U8) {
    for (int64_t i = 0; i < count; ++i) out[i] = source[i];
    return;
  }
  int64_t i = 0;
#if defined(__AVX2__) && defined(__F16C__)
  for (; type == ffi::DataType::F16 && i + 8 <= count; i += 8) {
    auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 2 * i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
  }
#endif
  if (type == ffi::DataType::BF16) {
    for (; i < count; ++i) {
      uint16_t half;
      std::memcpy(&half, source + 2 * i, 2);
      out[i] = bits_of<float>(static_cast<uint32_t>(half) << 16);
    }
  }
  for (; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, source + 2 * i, 2);
    out[i] = from_float16(half);
  }
}

}  // namespace
