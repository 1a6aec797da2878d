// Evicted KV as codecs store it, decoded page by page. The layout is cache/codecs/grouped.py's.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <vector>

#include "simd.h"

namespace calidrop {

constexpr int kCodedTokens = 16;       // of a page
constexpr int64_t kDecodedPages = 8;   // of a run that are held decoded at once

// The fields, their order and their types are those of native/codecs.py::Layout. All but the first are 0 for none.
struct CodecLayout {
  int64_t bits, is_float, gains, outliers;
  int64_t pages_per_block, pages_per_group, group_bytes, head_bytes, position_bytes, page_bytes, code_bytes;
};

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
      for (int i = 0; i < kPartLanes; i++) words[i] = load_as<uint32_t>(from + i / kPerWord * 4);
    }
    return words >> shifts & ((1u << BITS) - 1);
  }
}

// What integer codes of BITS bits, or codes of e4m3, stand for before offset and scale.
template <int BITS>
inline Part integers(PartWords codes) {
  return __builtin_convertvector((PartInts)codes, Part) - float((1 << BITS) - 1) / 2;
}
inline Part e4m3(PartWords codes) {
  const Part normal = (Part)(((codes & 0x7f) << 20) + (120u << 23));
  const Part number = (codes & 0x78) == 0 ? (normal - 0x1p-7f) * 2.0f : normal;
  return (Part)((PartWords)number | (codes & 0x80) << 24);
}

inline Part load_part(const float* from) { return load_as<Part>(from); }

// Decodes pages of one KV head's blocks; keeps what it knows of the last group.
template <class T>
class PageDecoder {
 public:
  PageDecoder(const CodecLayout& layout, int head_dim)
      : layout_(layout), head_dim_(head_dim), offset_(head_dim), scale_(head_dim) {}

  // keys, values: [16, D]. page: its number inside the block.
  void decode(const uint8_t* block, int64_t page, float* keys, float* values) {
    const uint8_t* group = block + page / layout_.pages_per_group * layout_.group_bytes;
    const int64_t within = page % layout_.pages_per_group;
    const uint8_t* codes = group + layout_.head_bytes + within * layout_.page_bytes;
    if (group != group_) read_head(group);
    if (layout_.is_float)
      decode_codes<8, true>(codes, keys, values);
    else if (layout_.bits == 8)
      decode_codes<8, false>(codes, keys, values);
    else if (layout_.bits == 4)
      decode_codes<4, false>(codes, keys, values);
    else
      decode_codes<2, false>(codes, keys, values);
    put_outliers(group, within * kCodedTokens, keys, values);
  }

 private:
  static float number(const uint8_t* from) { return to_float(load_as<bf16>(from)); }

  void read_head(const uint8_t* group) {
    for (int d = 0; d < head_dim_; d++) {
      offset_[d] = number(group + 2 * d);
      scale_[d] = number(group + 2 * (head_dim_ + d));
    }
    group_ = group;
  }

  template <int BITS, bool FLOAT>
  void decode_codes(const uint8_t* codes, float* keys, float* values) {
    const uint8_t* of_values = codes + kCodedTokens * layout_.code_bytes;
    const uint8_t* meta = of_values + kCodedTokens * layout_.code_bytes;
    const uint8_t* gains = meta + kCodedTokens * 4;
    for (int t = 0; t < kCodedTokens; t++) {
      const uint8_t* k = codes + t * layout_.code_bytes;
      const uint8_t* v = of_values + t * layout_.code_bytes;
      const float gain = layout_.gains ? number(gains + 2 * t) : 1.0f;
      const float offset = number(meta + 4 * t), scale = number(meta + 4 * t + 2);
      for (int d = 0; d < head_dim_; d += kPartLanes) {
        const Part key = numbers<BITS, FLOAT>(k + d * BITS / 8), value = numbers<BITS, FLOAT>(v + d * BITS / 8);
        put(keys + t * head_dim_ + d, load_part(scale_.data() + d) * key * gain + load_part(offset_.data() + d));
        put(values + t * head_dim_ + d, value * scale + offset);
      }
    }
  }

  template <int BITS, bool FLOAT>
  static Part numbers(const uint8_t* from) {
    if constexpr (FLOAT)
      return e4m3(codes_at<BITS>(from));
    else
      return integers<BITS>(codes_at<BITS>(from));
  }

  static void put(float* to, Part v) { std::memcpy(to, &v, sizeof(v)); }

  // The outlier tokens among the group's tokens [first, first + 16), exact.
  void put_outliers(const uint8_t* group, int64_t first, float* keys, float* values) {
    const uint8_t* positions = group + 4 * head_dim_;
    const uint8_t* exact = positions + layout_.position_bytes;
    for (int64_t i = 0; i < layout_.outliers; i++) {
      const int64_t t = positions[i] - first;
      if (t < 0 || t >= kCodedTokens) continue;
      const uint8_t* key = exact + i * 2 * head_dim_ * sizeof(T);
      for (int d = 0; d < head_dim_; d++) {
        keys[t * head_dim_ + d] = to_float(load_as<T>(key + d * sizeof(T)));
        values[t * head_dim_ + d] = to_float(load_as<T>(key + (head_dim_ + d) * sizeof(T)));
      }
    }
  }

  const CodecLayout& layout_;
  int head_dim_;
  std::vector<float> offset_, scale_;
  const uint8_t* group_ = nullptr;
};

}  // namespace calidrop
