// How codecs store evicted KV. The layout is evicted/codecs/grouped.py's.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "numbers.h"
#include "simd.h"

namespace calidrop {

// Codes of kPartLanes channels, the first in the lowest bits.
template <int BITS>
inline PartWords codes_at(const uint8_t* from) {
  if constexpr (BITS == 8) {
#if defined(__AVX512F__)
    return (PartWords)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)  // GCC converts eight bytes one by one
    return (PartWords)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    typedef uint8_t PartBytes __attribute__((vector_size(kPartLanes)));
    return __builtin_convertvector(load_as<PartBytes>(from), PartWords);
#endif
  } else {
    constexpr int kPerWord = 32 / BITS;
    PartWords words, shifts;
    for (int i = 0; i < kPartLanes; i++) shifts[i] = BITS * (i % kPerWord);
    if constexpr (kPartLanes <= kPerWord) {
      uint32_t word = 0;
      std::memcpy(&word, from, BITS * kPartLanes / 8);
      words = PartWords{} + word;
    } else {
      static_assert(kPartLanes == 2 * kPerWord);
#if defined(__AVX512F__)
      words = (PartWords)_mm512_mask_set1_epi32(_mm512_set1_epi32(load_as<int32_t>(from)), 0xff00, load_as<int32_t>(from + 4));
#else
      for (int i = 0; i < kPartLanes; i++) words[i] = load_as<uint32_t>(from + i / kPerWord * 4);
#endif
    }
    return words >> shifts & ((1u << BITS) - 1);
  }
}

// Tokens' codes as elements of a tile (attend.h), one struct a byte. A code stands for offset + scale * (kUnit * lane -
// kMiddle): what is the same for all codes is left to those who multiply.
template <int BITS>
struct Codes {
  static constexpr int kBits = BITS;
  static constexpr float kUnit = 1, kMiddle = -0.5f;
  uint8_t byte;
  // Close to zero, so that sums of them lose nothing. 2^23 + code has the code in its last bits.
  static Part lanes(const uint8_t* from) {
    return (Part)(codes_at<BITS>(from) | 0x4b000000u) - (0x1p23f + float(1 << (BITS - 1)));
  }
};

// e4m3: the bits of a half-precision number that is 256 times smaller, subnormal ones included.
struct FloatCodes {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 256, kMiddle = 0;
  uint8_t byte;
  static Part lanes(const uint8_t* from) {
#if defined(__AVX512F__)
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x7f)), 7);
    return (Part)_mm512_cvtph_ps(_mm256_or_si256(sign, rest));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)from));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7f)), 7);
    return (Part)_mm256_cvtph_ps(_mm_or_si128(sign, rest));
#else
    const PartWords codes = codes_at<8>(from);
    const Part normal = (Part)(((codes & 0x7f) << 20) + (112u << 23));
    const Part number = (codes & 0x78) == 0 ? (normal - 0x1p-15f) * 2.0f : normal;
    return (Part)((PartWords)number | (codes & 0x80) << 24);
#endif
  }
};

template <class E>
inline constexpr auto kIsCode = false;
template <int BITS>
inline constexpr auto kIsCode<Codes<BITS>> = true;
template <>
inline constexpr auto kIsCode<FloatCodes> = true;

// The place of a token's row, in elements from the first token's: of codes those are bytes.
template <class E>
inline long row_at(long token, int head_dim) {
  if constexpr (kIsCode<E>)
    return token * (head_dim * E::kBits / 8);
  else
    return token * head_dim;
}

// V lanes of a row, from dimension d on (a multiple of the lanes).
template <class V, class E>
inline V lanes_at(const E* row, int d) {
  if constexpr (!kIsCode<E>) {
    return load_lanes<V>(row + d);
  } else if constexpr (kIsPair<V>) {
    typedef decltype(V::lo) Half;
    return {lanes_at<Half>(row, d), lanes_at<Half>(row, d + int(sizeof(Half) / sizeof(float)))};
  } else {
    return E::lanes((const uint8_t*)row + d * E::kBits / 8);
  }
}

}  // namespace calidrop
