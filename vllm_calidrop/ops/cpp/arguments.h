// A decode call's arguments together, what is counted while it runs, and the similarity of two queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "contract.h"
#include "simd.h"

namespace calidrop {

struct Arguments : Shared, Layer, Step {
  Arguments(const Shared& shared, const Layer& layer, const Step& step) : Shared(shared), Layer(layer), Step(step) {}

  void count(int64_t slot, CounterColumn column, int64_t by) const {
    if (by) __atomic_fetch_add(counts + slot * counts_stride + column, by, __ATOMIC_RELAXED);
  }

  // One similarity, as ops/similarity.py counts it: NaN is none, rounding may exceed 1.
  void observe(float similar) const {
    if (std::isnan(similar)) return;
    const float rho = std::min(similar, 1.0f);
    int64_t bucket = 0;
    while (bucket < similarity_buckets && rho > similarity_bounds[bucket]) bucket++;
    __atomic_fetch_add(similarity + bucket, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(similarity + similarity_buckets + 1, std::llround(rho * 1e6), __ATOMIC_RELAXED);
  }
};

// The cosine of a query and a stored one.
template <class T>
float cosine(const float* a, const T* b, int n) {
  Floats ab = {}, aa = {}, bb = {};
  for (int i = 0; i < n; i += kLanes) {
    const Floats x = load(a + i), y = load(b + i);
    ab += x * y, aa += x * x, bb += y * y;
  }
  const float norms = std::sqrt(sum(aa)) * std::sqrt(sum(bb));
  return sum(ab) / std::max(norms, std::numeric_limits<float>::min());
}

}  // namespace calidrop
