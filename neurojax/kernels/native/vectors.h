// Vectors of the machine that this is compiled for: AVX-512 with VNNI, AVX2, or plain C++.
//
// A vector has kLanes lanes of 32 bits; kVectors of them are worked on at once, as many as the
// registers hold together with their sums for a few rows. Every lane sees the same operations in
// the same order whatever the width, so that no result depends on it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

constexpr int kLanes = 16, kVectors = 4;
using Ints = __m512i;
using Floats = __m512;

inline Ints load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(uint32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Ints fill(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
inline Floats fill(float a) { return _mm512_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats difference(Ints a, Ints b) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(a, b)); }
inline Ints shift(Ints a, int bits) { return _mm512_srli_epi32(a, bits); }
inline Floats fuse(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }

// kLanes bytes less a number that is a byte.
inline Floats from_bytes(const uint8_t* p, int less) {
  __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(a, _mm512_set1_epi32(less)));
}

// The sum of sixteen lanes: of lanes 8 apart, then of sums 4, 2 and 1 apart.
inline float sum_16(const Floats* a) { return _mm512_reduce_add_ps(a[0]); }

// Field j of every byte.
inline Ints fields(Ints words, int j) {
  return _mm512_and_si512(_mm512_srli_epi32(words, 2 * j), _mm512_set1_epi8(3));
}

// sum plus the products of four bytes in 0 .. 3 with four bytes in -127 .. 127.
inline Ints dot(Ints sum, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sum, codes, x); }

// Sixteen floats, to be looked up by the lowest four bits of each lane.
struct Table {
  Floats entries;
  explicit Table(const float* p) : entries(load(p)) {}
  Floats at(Ints index) const { return _mm512_permutexvar_ps(index, entries); }
};

// kLanes words of kLanes rows: the i-th from `offset` bytes into rows[r] on to out[i * stride + r].
inline void transpose(const uint8_t* const* rows, int64_t offset, uint32_t* out, int stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  // Quarter q of a[4 * i + j] holds word 4 * q + j of rows 4 * i .. 4 * i + 3.
  for (int j = 0; j < 4; ++j) {
    __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    store(out + j * stride, _mm512_shuffle_i32x4(even, even2, 0x88));
    store(out + (4 + j) * stride, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    store(out + (8 + j) * stride, _mm512_shuffle_i32x4(even, even2, 0xdd));
    store(out + (12 + j) * stride, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kLanes = 8, kVectors = 2;
using Ints = __m256i;
using Floats = __m256;

inline Ints load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Ints*>(p)); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(uint32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<Ints*>(p), a); }
inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
inline Ints fill(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
inline Floats fill(float a) { return _mm256_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats difference(Ints a, Ints b) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(a, b)); }
inline Ints shift(Ints a, int bits) { return _mm256_srli_epi32(a, bits); }
inline Floats fuse(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

inline Floats from_bytes(const uint8_t* p, int less) {
  __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(a, _mm256_set1_epi32(less)));
}

inline float sum_16(const Floats* a) {
  __m256 eight = _mm256_add_ps(a[0], a[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline Ints fields(Ints words, int j) {
  return _mm256_and_si256(_mm256_srli_epi32(words, 2 * j), _mm256_set1_epi8(3));
}

inline Ints dot(Ints sum, Ints codes, Ints x) {
  // Sums of two products stay below 2 * 3 * 127: nothing saturates.
  Ints pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

struct Table {
  Floats low, high;
  explicit Table(const float* p) : low(load(p)), high(load(p + 8)) {}
  Floats at(Ints index) const {
    Floats is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), is_high);
  }
};

inline void transpose(const uint8_t* const* rows, int64_t offset, uint32_t* out, int stride) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load(reinterpret_cast<const uint32_t*>(rows[i] + offset));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int j = 0; j < 4; ++j) {
    store(out + j * stride, _mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
    store(out + (4 + j) * stride, _mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
  }
}

#else

constexpr int kLanes = 8, kVectors = 1;

template <typename T>
struct Vector {
  T at[kLanes];

  template <typename F>
  explicit Vector(F of_lane) {
    for (int i = 0; i < kLanes; ++i) at[i] = of_lane(i);
  }
  Vector() = default;
};
using Ints = Vector<uint32_t>;
using Floats = Vector<float>;

inline Ints load(const uint32_t* p) { return Ints([=](int i) { return p[i]; }); }
inline Floats load(const float* p) { return Floats([=](int i) { return p[i]; }); }
inline void store(uint32_t* p, Ints a) { std::memcpy(p, a.at, sizeof a.at); }
inline void store(float* p, Floats a) { std::memcpy(p, a.at, sizeof a.at); }
inline Ints fill(uint32_t a) { return Ints([=](int) { return a; }); }
inline Floats fill(float a) { return Floats([=](int) { return a; }); }
inline Floats add(const Floats& a, const Floats& b) {
  return Floats([&](int i) { return a.at[i] + b.at[i]; });
}
inline Floats multiply(const Floats& a, const Floats& b) {
  return Floats([&](int i) { return a.at[i] * b.at[i]; });
}
inline Floats difference(const Ints& a, const Ints& b) {
  return Floats([&](int i) { return static_cast<float>(static_cast<int32_t>(a.at[i] - b.at[i])); });
}
inline Ints shift(const Ints& a, int bits) {
  return Ints([&](int i) { return a.at[i] >> bits; });
}

inline Floats fuse(const Floats& a, const Floats& b, const Floats& sum) {
  return Floats([&](int i) { return std::fma(a.at[i], b.at[i], sum.at[i]); });
}

inline Floats from_bytes(const uint8_t* p, int less) {
  return Floats([=](int i) { return static_cast<float>(p[i] - less); });
}

inline float sum_16(const Floats* a) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = a[i / 8].at[i % 8];
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline Ints fields(const Ints& words, int j) {
  return Ints([&](int i) { return words.at[i] >> 2 * j & 0x03030303u; });
}

inline Ints dot(const Ints& sum, const Ints& codes, const Ints& x) {
  Ints out = sum;
  for (int bit = 0; bit < 32; bit += 8) {
    for (int i = 0; i < kLanes; ++i) {
      auto signed_x = static_cast<uint32_t>(static_cast<int8_t>(x.at[i] >> bit));
      out.at[i] += (codes.at[i] >> bit & 3) * signed_x;
    }
  }
  return out;
}

struct Table {
  const float* entries;
  explicit Table(const float* p) : entries(p) {}
  Floats at(const Ints& index) const {
    return Floats([&](int i) { return entries[index.at[i] & 15]; });
  }
};

inline void transpose(const uint8_t* const* rows, int64_t offset, uint32_t* out, int stride) {
  for (int i = 0; i < kLanes; ++i) {
    for (int r = 0; r < kLanes; ++r) {
      std::memcpy(out + i * stride + r, rows[r] + offset + 4 * i, 4);
    }
  }
}

#endif

}  // namespace
