// Sixteen floats at a time, in the compiler's vector extensions, so that any CPU the compiler knows will do.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace calidrop {

constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halfwords __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};
#if defined(__FLT16_MANT_DIG__)
#define CALIDROP_HAS_FP16 1
typedef _Float16 fp16;
typedef fp16 Fp16s __attribute__((vector_size(32)));
#endif

template <class V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

inline Floats broadcast(float x) { return Floats{} + x; }

inline Floats load(const float* from) { return load_as<Floats>(from); }
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof(v)); }
inline Floats load(const bf16* from) {
  return (Floats)(__builtin_convertvector(load_as<Halfwords>(from), Words) << 16);
}
#if CALIDROP_HAS_FP16
inline Floats load(const fp16* from) { return __builtin_convertvector(load_as<Fp16s>(from), Floats); }
#endif

// A line of 16 interleaved bf16 pairs: the first, and the second, of every pair.
inline Floats evens(Words line) { return (Floats)(line << 16); }
inline Floats odds(Words line) { return (Floats)(line & 0xffff0000u); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return load_as<float>(&bits);
}
#if CALIDROP_HAS_FP16
inline float to_float(fp16 x) { return float(x); }
#endif

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

template <int A, int B, int C, int D, int E, int F, int G, int H, int I, int J, int K, int L, int M, int N, int O, int P>
inline Floats pick(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P);
}

// Lane i of the result is the sum of all lanes of v[i].
inline Floats sums_of(Floats* v) {
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
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

inline float maximum(Floats v) {
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87 and for -inf.
inline Floats exp_nonpositive(Floats x) {
#if defined(__AVX512F__)
  const Floats n = _mm512_maskz_roundscale_ps(0xffff, x * 1.44269504088896341f, 0);
#else
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
#endif
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_mask_scalef_ps(Floats{}, _mm512_cmp_ps_mask(x, broadcast(-87.0f), _CMP_GE_OQ), p, n);
#else
  const Floats scaled = (Floats)((Ints)p + (((Ints)shifted - (Ints)magic) << 23));
  return x < -87.0f ? Floats{} : scaled;
#endif
}

// 2^t for t <= 0, finite, within 2e-7; 0 far below.
inline Floats exp2_nonpositive(Floats t) {
#if defined(__AVX512F__)
  const Floats n = _mm512_maskz_roundscale_ps(0xffff, t, 0);
  const Floats r = t - n;
#else
  const Floats clamped = max(t, broadcast(-126.0f)), magic = broadcast(12582912.0f);
  const Floats shifted = clamped + magic;
  const Floats r = clamped - (shifted - magic);
#endif
  Floats p = broadcast(1.3264726899e-3f);
  p = p * r + 9.6715126606e-3f;
  p = p * r + 5.5507337442e-2f;
  p = p * r + 2.4022242085e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  return t < -126.0f ? Floats{} : (Floats)((Ints)p + (((Ints)shifted - (Ints)magic) << 23));
#endif
}

inline bool any_above(Floats v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, broadcast(bound), _CMP_GT_OQ) != 0;
#else
  return maximum(v) > bound;
#endif
}

}  // namespace calidrop
