// Attention of a few query heads over tiles of tokens, one pass over K and V, in fp32, with the log-sum-exp.
#pragma once

#include <algorithm>
#include <vector>

#include "codecs.h"
#include "simd.h"

namespace calidrop {

enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How the elements of a tile of `width` tokens lie. All numbers here are shared with library.py.
enum KeyLayout { kKeyTransposed = 0, kKeyPairs = 1, kKeyPlain = 2 };  // [D, width]; [width/16, D/2, 16, 2]; [width, D]
enum ValueLayout { kValuePlain = 0, kValuePairs = 1 };                // [width, D]; [D/16, width/2, 16, 2]

// Tokens [first, last) of a tile are attended; the others may hold anything.
template <class T>
struct Tile {
  const T* keys;
  const T* values;
  int first, last;
};

constexpr int kChunkTokens = 512;        // tokens whose logits are held at once, at most
constexpr long kChunkBytes = 64 * 1024;  // of their keys: what is fetched ahead must still be in the second-level cache
constexpr int kAhead = 2;                // tiles whose keys are fetched before they are needed

// Fetch the lines of `elements` elements, a few at a time between arithmetic: more at once than the CPU has buffers for
// would make it wait.
template <class T>
inline void fetch(const T* from, long elements) {
  for (long i = 0; i < elements; i += long(64 / sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// Logits of 16 * V tokens for H heads. query: [H, D]. Meanwhile, if FETCH, the same part of what lies `ahead` is fetched.
template <int H, int V, bool FETCH, class T>
inline void transposed_logits(const T* keys, long ahead, long width, int head_dim, const float* query, float* out,
                              long stride) {
  constexpr int kPhases = std::min(4, std::max(1, kSums / (H * V)));  // enough sums to hide the latency of one
  Floats sums[kPhases][H][V] = {};
  for (int d = 0; d < head_dim; d += kPhases)
    for (int p = 0; p < kPhases; p++)
      for (int v = 0; v < V; v++) {
        const Floats k = load(keys + (d + p) * width + v * kLanes);
        if (FETCH && (sizeof(T) == 4 || v % 2 == 0)) __builtin_prefetch(keys + ahead + (d + p) * width + v * kLanes);
        for (int h = 0; h < H; h++) sums[p][h][v] += k * query[h * head_dim + d + p];
      }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) {
      Floats total = sums[0][h][v];
      for (int p = 1; p < kPhases; p++) total += sums[p][h][v];
      store(out + h * stride + v * kLanes, total);
    }
}

template <int H, int V>
inline void paired_logits(const bf16* keys, int head_dim, const float* query, float* out, long stride) {
  Floats even[H][V] = {}, odd[H][V] = {};
  for (int d = 0; d < head_dim; d += 2)
    for (int v = 0; v < V; v++) {
      const Floats line = load_line(keys + v * kLanes * head_dim + d * kLanes);
      const Floats a = evens(line), b = odds(line);
      for (int h = 0; h < H; h++) {
        even[h][v] += a * query[h * head_dim + d];
        odd[h][v] += b * query[h * head_dim + d + 1];
      }
    }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) store(out + h * stride + v * kLanes, even[h][v] + odd[h][v]);
}

// Logits of 16 tokens: as many sums at a time as a register has lanes, reduced together. H is 1, 2 or 4. Meanwhile their
// values are fetched.
template <int H, class T>
inline void plain_logits(const T* keys, const T* values, int head_dim, const float* query, float* out, long stride) {
  constexpr int kTokens = kPartLanes / H;
  for (int t = 0; t < kLanes; t += kTokens) {
    fetch(values + row_at<T>(t, head_dim), row_at<T>(kTokens, head_dim));
    Part sums[kPartLanes] = {};
    for (int d = 0; d < head_dim; d += kPartLanes) {
      Part q[H];
      for (int h = 0; h < H; h++) q[h] = load_lanes<Part>(query + h * head_dim + d);
      for (int i = 0; i < kTokens; i++) {
        const Part k = lanes_at<Part>(keys + row_at<T>(t + i, head_dim), d);
        for (int h = 0; h < H; h++) sums[h * kTokens + i] += k * q[h];
      }
    }
    const Part logits = sums_of(sums);
    for (int h = 0; h < H; h++)
      std::memcpy(out + h * stride + t, (const float*)&logits + h * kTokens, kTokens * sizeof(float));
  }
}

// ahead: keys that will be needed next, a whole tile; null: none, or not of this layout.
template <int L, int H, class T>
inline void tile_logits_of(const Tile<T>& tile, const T* ahead, int width, int head_dim, const float* query, float* out,
                           long stride) {
  int t = tile.first / kLanes * kLanes;
  if constexpr (L != kKeyPlain && 2 * H <= kSums)
    for (; t + 2 * kLanes <= width && t + kLanes < tile.last; t += 2 * kLanes) {
      if constexpr (L == kKeyTransposed) {
        if (ahead)
          transposed_logits<H, 2, true>(tile.keys + t, ahead - tile.keys, width, head_dim, query, out + t, stride);
        else
          transposed_logits<H, 2, false>(tile.keys + t, 0, width, head_dim, query, out + t, stride);
      } else {
        paired_logits<H, 2>(tile.keys + t * head_dim, head_dim, query, out + t, stride);
      }
    }
  for (; t < tile.last; t += kLanes) {
    if constexpr (L == kKeyTransposed)
      transposed_logits<H, 1, false>(tile.keys + t, 0, width, head_dim, query, out + t, stride);
    else if constexpr (L == kKeyPairs)
      paired_logits<H, 1>(tile.keys + t * head_dim, head_dim, query, out + t, stride);
    else
      plain_logits<H>(tile.keys + row_at<T>(t, head_dim), tile.values + row_at<T>(t, head_dim), head_dim, query, out + t,
                      stride);
  }
}

template <int L, class T>
inline void tile_logits(const Tile<T>& tile, int width, int head_dim, const float* query, int heads, float* out,
                        long stride, const T* ahead = nullptr) {
  int h = 0;
  const auto some = [&](auto count) {
    constexpr int H = decltype(count)::value;
    for (; h + H <= heads; h += H, ahead = nullptr)
      tile_logits_of<L, H>(tile, ahead, width, head_dim, query + h * head_dim, out + h * stride, stride);
  };
  // Sixteen sums of a register, or twelve of half a one on AVX2, and their operands: all of the registers.
  if constexpr (L == kKeyTransposed) some(std::integral_constant<int, kSums == 4 ? 6 : 8>{});
  some(std::integral_constant<int, 4>{});
  some(std::integral_constant<int, 2>{});
  some(std::integral_constant<int, 1>{});
}

// out [H, D] += weights [H, tokens] V for 16 * V dimensions from d on, over several tiles. Meanwhile the same part of the
// keys of the tiles from `next` on is fetched, `left` of them.
template <int H, int V, class T>
inline void plain_values(const Tile<T>* tiles, int count, const Tile<T>* next, int left, int width, int head_dim, int d,
                         const float* weights, long stride, float* out) {
  Floats sums[H][V];
  out += d;
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) sums[h][v] = load(out + h * head_dim + v * kLanes);
  for (int i = 0; i < count; i++, weights += width) {
    const T* ahead = i < left ? next[i].keys + row_at<T>(1, d) : nullptr;
    for (int t = tiles[i].first; t < tiles[i].last; t++) {
      const T* row = tiles[i].values + row_at<T>(t, head_dim);
      if (ahead) fetch(ahead + row_at<T>(t, head_dim), row_at<T>(1, V * kLanes));
      Floats value[V];
      for (int v = 0; v < V; v++) value[v] = lanes_at<Floats>(row, d + v * kLanes);
      for (int h = 0; h < H; h++)
        for (int v = 0; v < V; v++) sums[h][v] += value[v] * weights[h * stride + t];
    }
  }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) store(out + h * head_dim + v * kLanes, sums[h][v]);
}

template <int H, int V>
inline void paired_values(const Tile<bf16>* tiles, int count, int width, int head_dim, int d, const float* weights,
                          long stride, float* out) {
  Floats sums[H][V];
  out += d;
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) sums[h][v] = load(out + h * head_dim + v * kLanes);
  for (int i = 0; i < count; i++, weights += width) {
    const Tile<bf16>& tile = tiles[i];
    const auto line = [&](int t, int v) {
      return load_line(tile.values + long(d + v * kLanes) * width + t / 2 * 2 * kLanes);
    };
    const auto alone = [&](int t) {  // one token whose neighbour in the pair is not attended
      for (int v = 0; v < V; v++) {
        const Floats value = t % 2 ? odds(line(t, v)) : evens(line(t, v));
        for (int h = 0; h < H; h++) sums[h][v] += value * weights[h * stride + t];
      }
    };
    int t = tile.first;
    if (t % 2) alone(t++);
    for (; t + 2 <= tile.last; t += 2)
      for (int v = 0; v < V; v++) {
        const Floats both = line(t, v);
        const Floats a = evens(both), b = odds(both);
        for (int h = 0; h < H; h++) {
          sums[h][v] += a * weights[h * stride + t];
          sums[h][v] += b * weights[h * stride + t + 1];
        }
      }
    if (t < tile.last) alone(t);
  }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < V; v++) store(out + h * head_dim + v * kLanes, sums[h][v]);
}

// Tiles whose values are added, and those that come after them.
template <class T>
struct Run {
  const Tile<T>*tiles, *next;
  int count, left;
};

template <int L, int H, int V, class T>
inline void values_of(const Run<T>& run, int width, int head_dim, int d, const float* weights, long stride, float* out) {
  if constexpr (L == kValuePlain)
    plain_values<H, V>(run.tiles, run.count, run.next, run.left, width, head_dim, d, weights, stride, out);
  else
    paired_values<H, V>(run.tiles, run.count, width, head_dim, d, weights, stride, out);
}

template <int L, int H, class T>
inline void add_values_of(const Run<T>& run, int width, int head_dim, const float* weights, long stride, float* out) {
  int d = 0;
  if constexpr (4 * H <= kValueSums)
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
      values_of<L, H, 4>(run, width, head_dim, d, weights, stride, out);
  if constexpr (2 * H <= kValueSums)
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes)
      values_of<L, H, 2>(run, width, head_dim, d, weights, stride, out);
  for (; d < head_dim; d += kLanes) values_of<L, H, 1>(run, width, head_dim, d, weights, stride, out);
}

template <int L, class T>
inline void add_values(Run<T> run, int width, int head_dim, const float* weights, int heads, long stride, float* out) {
  int h = 0;
  for (; h + 4 <= heads; h += 4, run.left = 0)
    add_values_of<L, 4>(run, width, head_dim, weights + h * stride, stride, out + h * head_dim);
  for (; h + 2 <= heads; h += 2, run.left = 0)
    add_values_of<L, 2>(run, width, head_dim, weights + h * stride, stride, out + h * head_dim);
  for (; h < heads; h++, run.left = 0)
    add_values_of<L, 1>(run, width, head_dim, weights + h * stride, stride, out + h * head_dim);
}

// A head's softmax over what was summed so far: logits' maximum, and the sum of their exponentials relative to it.
struct Softmax {
  float top = -kInf, total = 0;

  // The maximum becomes at least `found`; returns what is left of everything that was summed relative to the old one.
  float raise(float found) {
    if (found <= top) return 1;
    const float shrink = top == -kInf ? 1 : std::exp(top - found);
    top = found, total *= shrink;
    return shrink;
  }
  float lse() const { return total > 0 ? top + std::log(total) : -kInf; }
  float share() const { return total > 0 ? 1 / total : 0; }
};

inline void scale_by(float factor, float* out, int count) {
  for (int i = 0; i < count; i++) out[i] *= factor;
}

// out [head_dim], lse become the state over the union of two disjoint sets of tokens (equation 1 of the paper).
inline void merge_into(float* out, float& lse, const float* other, float other_lse, int head_dim) {
  const float top = std::max(lse, other_lse);
  if (top == -kInf) return;
  const float mine = std::exp(lse - top), its = std::exp(other_lse - top), total = mine + its;
  const float my_share = mine / total, its_share = its / total;
  for (int d = 0; d < head_dim; d++) out[d] = out[d] * my_share + other[d] * its_share;
  lse = top + std::log(total);
}

// What an Attention works in; a thread keeps one and uses it again.
template <class T>
struct Workspace {
  std::vector<float> weights;
  std::vector<Softmax> sums;
  std::vector<Tile<T>> tiles;
};

// Attention states of `heads` queries over what was added so far.
template <class T>
class Attention {
 public:
  // query: [heads, D] fp32; out: [heads, D], lse: [heads], complete after finish(). width: tokens of a tile.
  Attention(Workspace<T>& space, const float* query, int heads, int head_dim, float scale, int width, float* out,
            float* lse)
      : query_(query),
        heads_(heads),
        head_dim_(head_dim),
        scale_(scale),
        width_(width),
        out_(out),
        lse_(lse),
        weights_(space.weights),
        sums_(space.sums),
        tiles_(space.tiles) {
    const int at_once = int(std::min<long>(kChunkTokens, kChunkBytes / (head_dim * sizeof(T))));
    per_chunk_ = std::max(1, at_once / width);
    stride_ = long(per_chunk_) * width;
    if (long(weights_.size()) < heads * stride_) weights_.resize(heads * stride_);
    sums_.assign(heads, Softmax{});
    tiles_.clear();
    std::fill(out, out + heads * head_dim, 0.0f);
  }

  void add(const Tile<T>& tile) { tiles_.push_back(tile); }

  template <int K, int V>
  void finish() {
    const int all = int(tiles_.size());
    for (int first = 0; first < all; first += per_chunk_) {
      const int end = std::min(all, first + per_chunk_);
      attend<K, V>({tiles_.data() + first, tiles_.data() + end, end - first, all - end}, first == 0);
    }
    for (int h = 0; h < heads_; h++) {
      lse_[h] = sums_[h].lse();
      scale_by(sums_[h].share(), out_ + h * head_dim_, head_dim_);
    }
  }

 private:
  template <int K, int V>
  void attend(const Run<T>& run, bool is_first) {
    for (int i = 0; i < run.count; i++) {
      if constexpr (K == kKeyPlain) {
        if (is_first && i + kAhead < run.count) prefetch(run.tiles[i + kAhead].keys);
      } else {
        if (i + kAhead < run.count) prefetch(run.tiles[i + kAhead].keys);
        prefetch(run.tiles[i].values);
      }
      tile_logits<K>(run.tiles[i], width_, head_dim_, query_, heads_, weights_.data() + i * width_, stride_);
    }
    for (int h = 0; h < heads_; h++) softmax(run, h, weights_.data() + h * stride_);
    add_values<V>(run, width_, head_dim_, weights_.data(), heads_, stride_, out_);
  }

  // The keys or values of a tile: the hardware does not foresee where the next tile lies.
  void prefetch(const T* tile) {
    const char* at = (const char*)tile;
    for (const char* end = at + long(width_) * head_dim_ * sizeof(T); at < end; at += 64) __builtin_prefetch(at);
  }

  // Logits of the chunk become weights relative to the new maximum; what was summed before is rescaled to it.
  void softmax(const Run<T>& run, int head, float* weights) {
    Floats tops = broadcast(-kInf);
    for (int i = 0; i < run.count; i++)
      for (int t = run.tiles[i].first / kLanes * kLanes; t < run.tiles[i].last; t += kLanes) {
        float* at = weights + i * width_ + t;
        const Floats logits = keep(load(at) * scale_, run.tiles[i].first - t, run.tiles[i].last - t);
        store(at, logits);
        tops = max(tops, logits);
      }
    const float shrink = sums_[head].raise(maximum(tops)), top = sums_[head].top;
    if (top == -kInf) return;
    if (shrink != 1) scale_by(shrink, out_ + head * head_dim_, head_dim_);
    Floats totals = {};
    for (int i = 0; i < run.count; i++)
      for (int t = run.tiles[i].first / kLanes * kLanes; t < run.tiles[i].last; t += kLanes) {
        float* at = weights + i * width_ + t;
        const Floats weight = exp_nonpositive(load(at) - top);
        store(at, weight);
        totals += weight;
      }
    sums_[head].total += sum(totals);
  }

  const float* query_;
  int heads_, head_dim_;
  float scale_;
  int width_, per_chunk_;
  long stride_;
  float *out_, *lse_;
  std::vector<float>& weights_;
  std::vector<Softmax>& sums_;
  std::vector<Tile<T>>& tiles_;
};

}  // namespace calidrop
