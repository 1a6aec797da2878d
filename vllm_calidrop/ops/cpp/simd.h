// Sixteen floats at a time, in the compiler's vector extensions, so that any CPU the compiler knows will do.
//
// A vector type wider than the CPU's registers is kept in memory by GCC, and every operation on it loads and stores.
// So sixteen floats are one register where the CPU has such, and pairs of registers elsewhere.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace calidrop {

constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)
constexpr int kPartLanes = 16;  // floats of a register
#elif defined(__AVX__)
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;
#endif
typedef float Part __attribute__((vector_size(4 * kPartLanes)));
typedef int32_t PartInts __attribute__((vector_size(4 * kPartLanes)));
typedef uint32_t PartWords __attribute__((vector_size(4 * kPartLanes)));
typedef uint16_t PartHalfwords __attribute__((vector_size(2 * kPartLanes)));

template <class V>
struct Pair {
  V lo, hi;
};
template <class V>
constexpr bool kIsPair = false;
template <class V>
constexpr bool kIsPair<Pair<V>> = true;

#if defined(__AVX512F__)
typedef Part Floats;
#elif defined(__AVX__)
typedef Pair<Part> Floats;
#else
typedef Pair<Pair<Part>> Floats;
#endif

// Sums of sixteen floats that stay in registers beside their operands: of logits, and of values.
#if defined(__AVX512F__)
constexpr int kSums = 16, kValueSums = 16;
#else
constexpr int kSums = 4, kValueSums = 4;
#endif

struct bf16 {
  uint16_t bits;
};
#if defined(__FLT16_MANT_DIG__)
#define CALIDROP_HAS_FP16 1
typedef _Float16 fp16;
typedef fp16 PartFp16s __attribute__((vector_size(2 * kPartLanes)));
#endif

// Operators of pairs: those of their halves.
#define CALIDROP_OPERATOR(op)                                                       \
  template <class V>                                                                \
  inline Pair<V> operator op(Pair<V> a, Pair<V> b) {                                \
    return {a.lo op b.lo, a.hi op b.hi};                                            \
  }                                                                                 \
  template <class V>                                                                \
  inline Pair<V> operator op(Pair<V> a, float b) {                                  \
    return {a.lo op b, a.hi op b};                                                  \
  }                                                                                 \
  template <class V, class B>                                                       \
  inline Pair<V>& operator op##=(Pair<V>& a, B b) {                                 \
    return a = a op b;                                                              \
  }
CALIDROP_OPERATOR(+)
CALIDROP_OPERATOR(-)
CALIDROP_OPERATOR(*)
#undef CALIDROP_OPERATOR

template <class V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// Halfwords of a register's lanes, widened. GCC puts its own conversion together from halves.
inline PartWords load_halfwords(const void* from) {
#if defined(__AVX512F__)
  return (PartWords)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (PartWords)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  return __builtin_convertvector(load_as<PartHalfwords>(from), PartWords);
#endif
}

// V lanes from consecutive elements of T.
template <class V, class T>
inline V load_lanes(const T* from) {
  if constexpr (kIsPair<V>) {
    typedef decltype(V::lo) Half;
    return {load_lanes<Half>(from), load_lanes<Half>(from + sizeof(Half) / sizeof(float))};
  } else if constexpr (std::is_same_v<T, float>) {
    return load_as<V>(from);
  } else if constexpr (std::is_same_v<T, bf16>) {
    return (Part)(load_halfwords(from) << 16);
  } else {
#if defined(__AVX512F__)
    return (Part)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (Part)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif CALIDROP_HAS_FP16
    return __builtin_convertvector(load_as<PartFp16s>(from), Part);
#endif
  }
}

template <class T>
inline Floats load(const T* from) {
  return load_lanes<Floats>(from);
}
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof(v)); }
inline Floats broadcast(float x) { return Floats{} + x; }

// A line of 16 interleaved bf16 pairs, as bits: the first, and the second, of every pair.
inline Floats load_line(const bf16* from) { return load_as<Floats>(from); }
inline Part evens(Part line) { return (Part)((PartWords)line << 16); }
inline Part odds(Part line) { return (Part)((PartWords)line & 0xffff0000u); }
template <class V>
inline Pair<V> evens(Pair<V> line) {
  return {evens(line.lo), evens(line.hi)};
}
template <class V>
inline Pair<V> odds(Pair<V> line) {
  return {odds(line.lo), odds(line.hi)};
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return load_as<float>(&bits);
}
inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, bf16* to) {  // to the nearest, ties to even
  const uint32_t bits = load_as<uint32_t>(&x);
  to->bits = x == x ? uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}
#if CALIDROP_HAS_FP16
inline float to_float(fp16 x) { return float(x); }
inline void from_float(float x, fp16* to) { *to = fp16(x); }
#endif

inline Part max(Part a, Part b) { return a > b ? a : b; }
template <class V>
inline Pair<V> max(Pair<V> a, Pair<V> b) {
  return {max(a.lo, b.lo), max(a.hi, b.hi)};
}

// Lanes [first, last) of v; -inf in the others.
inline Part keep(Part v, int first, int last) {
  PartInts lane;
  for (int i = 0; i < kPartLanes; i++) lane[i] = i;
  return (lane >= first) & (lane < last) ? v : Part{} - kInf;
}
template <class V>
inline Pair<V> keep(Pair<V> v, int first, int last) {
  constexpr int half = sizeof(V) / sizeof(float);
  return {keep(v.lo, first, last), keep(v.hi, first - half, last - half)};
}

template <int... I>
inline Part pick(Part a, Part b) {
  return __builtin_shufflevector(a, b, I...);
}

// Lane i of the result is the sum of all lanes of v[i]; v: kPartLanes of them, overwritten.
inline Part sums_of(Part* v) {
#if defined(__AVX512F__)
  for (int i = 0; i < 8; i++)
    v[i] = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(v[i], v[i + 8]) +
           pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(v[i], v[i + 8]);
  for (int i = 0; i < 4; i++)
    v[i] = pick<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(v[i], v[i + 4]) +
           pick<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(v[i], v[i + 4]);
  for (int i = 0; i < 2; i++)
    v[i] = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(v[i], v[i + 2]) +
           pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(v[i], v[i + 2]);
  return pick<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(v[0], v[1]) +
         pick<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(v[0], v[1]);
#elif defined(__AVX__)
  for (int i = 0; i < 4; i++)
    v[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(v[i], v[i + 4]) + pick<4, 5, 6, 7, 12, 13, 14, 15>(v[i], v[i + 4]);
  for (int i = 0; i < 2; i++)
    v[i] = pick<0, 1, 8, 9, 4, 5, 12, 13>(v[i], v[i + 2]) + pick<2, 3, 10, 11, 6, 7, 14, 15>(v[i], v[i + 2]);
  return pick<0, 8, 2, 10, 4, 12, 6, 14>(v[0], v[1]) + pick<1, 9, 3, 11, 5, 13, 7, 15>(v[0], v[1]);
#else
  for (int i = 0; i < 2; i++) v[i] = pick<0, 1, 4, 5>(v[i], v[i + 2]) + pick<2, 3, 6, 7>(v[i], v[i + 2]);
  return pick<0, 4, 2, 6>(v[0], v[1]) + pick<1, 5, 3, 7>(v[0], v[1]);
#endif
}

inline float sum(Part v) {
  float total = 0;
  for (int i = 0; i < kPartLanes; i++) total += v[i];
  return total;
}
template <class V>
inline float sum(Pair<V> v) {
  return sum(v.lo + v.hi);
}

inline float maximum(Part v) {
  float top = v[0];
  for (int i = 1; i < kPartLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}
template <class V>
inline float maximum(Pair<V> v) {
  return maximum(max(v.lo, v.hi));
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87 and for -inf.
inline Part exp_nonpositive(Part x) {
#if defined(__AVX512F__)
  const Part n = _mm512_maskz_roundscale_ps(0xffff, x * 1.44269504088896341f, 0);
#else
  const Part magic = Part{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Part shifted = x * 1.44269504088896341f + magic;
  const Part n = shifted - magic;
#endif
  const Part r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Part p = Part{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_mask_scalef_ps(Part{}, _mm512_cmp_ps_mask(x, Part{} - 87.0f, _CMP_GE_OQ), p, n);
#else
  const Part scaled = (Part)((PartInts)p + (((PartInts)shifted - (PartInts)magic) << 23));
  return x < -87.0f ? Part{} : scaled;
#endif
}
template <class V>
inline Pair<V> exp_nonpositive(Pair<V> x) {
  return {exp_nonpositive(x.lo), exp_nonpositive(x.hi)};
}

// 2^t for t <= 0, finite, within 2e-7; 0 below -126, on every CPU: scores that underflow are equal.
inline Part exp2_nonpositive(Part t) {
#if defined(__AVX512F__)
  const Part n = _mm512_maskz_roundscale_ps(0xffff, t, 0);
  const Part r = t - n;
#else
  const Part clamped = max(t, Part{} - 126.0f), magic = Part{} + 12582912.0f;
  const Part shifted = clamped + magic;
  const Part r = clamped - (shifted - magic);
#endif
  Part p = Part{} + 1.3264726899e-3f;
  p = p * r + 9.6715126606e-3f;
  p = p * r + 5.5507337442e-2f;
  p = p * r + 2.4022242085e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, Part{} - 126.0f, _CMP_GE_OQ), p, n);
#else
  return t < -126.0f ? Part{} : (Part)((PartInts)p + (((PartInts)shifted - (PartInts)magic) << 23));
#endif
}
template <class V>
inline Pair<V> exp2_nonpositive(Pair<V> t) {
  return {exp2_nonpositive(t.lo), exp2_nonpositive(t.hi)};
}

inline bool any_above(Floats v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, broadcast(bound), _CMP_GT_OQ) != 0;
#else
  return maximum(v) > bound;
#endif
}

}  // namespace calidrop
