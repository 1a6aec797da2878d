// How much attention each prompt token received from some queries: causal softmax rows, summed per column and KV head.
// The meaning is policies/h2o.py::add_column_sums'; keys are read in vLLM's blocks, and no more than kRows rows exist.

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define CALIDROP_AMX 1
#include <immintrin.h>
#endif

#include "attend.h"

namespace calidrop {

// The fields, their order and their types are those of library.py::ColumnArguments.
extern "C" struct ColumnArguments {
  int64_t dtype, key_layout, threads, amx;
  int64_t queries, first_position, kv_heads, group, head_dim, block_size;
  double scale;
  const void* query;  // [queries, kv_heads * group, D], tokens token_stride apart
  int64_t token_stride;
  const void* cache;
  int64_t block_stride, head_stride;
  const int32_t* blocks;  // the sequence's columns
  float* sums;            // [kv_heads, >= first_position + queries], heads sums_stride apart
  int64_t sums_stride;
};

namespace {

constexpr int kRows = 32;  // query rows whose logits are held at once

#if CALIDROP_AMX
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers in our shape while it lives; others (oneDNN) find the shape they had configured.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    if (before_[0])
      _tile_loadconfig(before_);
    else
      _tile_release();
  }

 private:
  alignas(64) uint8_t before_[64] = {};
};

// Logits of 32 queries [32, D] for 32 tokens of the paired layout.
inline void matrix_logits(const bf16* keys, int head_dim, const bf16* query, float* out, long stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int d = 0; d < head_dim; d += 32) {
    _tile_loadd(4, query + d, head_dim * sizeof(bf16));
    _tile_loadd(5, query + 16 * head_dim + d, head_dim * sizeof(bf16));
    _tile_loadd(6, keys + d * kLanes, 64);
    _tile_loadd(7, keys + kLanes * head_dim + d * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, stride * sizeof(float));
  _tile_stored(1, out + kLanes, stride * sizeof(float));
  _tile_stored(2, out + 16 * stride, stride * sizeof(float));
  _tile_stored(3, out + 16 * stride + kLanes, stride * sizeof(float));
}
#else
struct Tiles {
  Tiles() {}
};
inline void matrix_logits(const bf16*, int, const bf16*, float*, long) {}
#endif

// One pass over the keys, strip by strip: logits in a strip that stays in the first-level cache, then their exponentials
// relative to the largest logit so far, which are kept. Afterwards every row's sum is known, and they are added up.
template <class T, int K>
class Columns {
 public:
  explicit Columns(const ColumnArguments& a)
      : a_(a),
        head_dim_(int(a.head_dim)),
        width_(int(a.block_size)),
        strip_(std::max(1, kStripTokens / width_) * width_),
        strips_(int((a.first_position + a.queries + strip_ - 1) / strip_)),
        strip_stride_(strip_ + kLanes),  // not a power of two: rows share no cache set
        stride_(long(strips_) * strip_ + kLanes),
        logits_(kRows * strip_stride_),
        weights_(kRows * stride_),
        tops_(long(strips_) * kRows),
        query_(kRows * head_dim_),
        packed_(kRows * head_dim_) {}

  void add(int64_t kv_head) {
    for (int64_t h = kv_head * a_.group; h < (kv_head + 1) * a_.group; h++)
      for (int64_t start = 0; start < a_.queries; start += kRows) {
        const int rows = int(std::min<int64_t>(kRows, a_.queries - start));
        take_queries(h, start, rows);
        add_rows(kv_head, rows, a_.first_position + start);
      }
  }

 private:
  static constexpr int kStripTokens = 128;
  static constexpr float kNothing = -1e30f;  // a logit without weight, in powers of two

  void take_queries(int64_t head, int64_t start, int rows) {
    if (a_.amx) std::fill(packed_.begin(), packed_.end(), T{});
    for (int row = 0; row < rows; row++) {
      const T* from = (const T*)a_.query + (start + row) * a_.token_stride + head * head_dim_;
      if (a_.amx)
        std::copy_n(from, head_dim_, packed_.data() + row * head_dim_);
      else
        for (int d = 0; d < head_dim_; d++) query_[row * head_dim_ + d] = to_float(from[d]);
    }
  }

  // Rows at positions first, first + 1, ...
  void add_rows(int64_t kv_head, int rows, int64_t first) {
    const int64_t seen = first + rows;
    std::fill(std::begin(top_), std::end(top_), kNothing);
    std::fill(std::begin(totals_), std::end(totals_), Floats{});
    const int strips = int((seen + strip_ - 1) / strip_);
    for (int strip = 0; strip < strips; strip++) {
      const int64_t base = int64_t(strip) * strip_;
      const int last = int(std::min<int64_t>(strip_, seen - base));
      strip_logits(kv_head, rows, base, last);
      for (int row = 0; row < rows; row++) weigh(row, strip, last, first + row + 1 - base);
    }
    for (int row = 0; row < rows; row++) total_[row] = sum(totals_[row]);
    for (int strip = 0; strip < strips; strip++) {
      const int64_t base = int64_t(strip) * strip_;
      add_strip(a_.sums + kv_head * a_.sums_stride + base, rows, strip, std::min<int64_t>(strip_, seen - base));
    }
  }

  void strip_logits(int64_t kv_head, int rows, int64_t base, int last) {
    for (int at = 0; at < last; at += width_) {
      const int64_t block = a_.blocks[(base + at) / width_];
      const T* keys = keys_of(block, kv_head);
      const int count = std::min(width_, last - at);
      const bool more = at + width_ < last;
      const T* next = more ? keys_of(a_.blocks[(base + at) / width_ + 1], kv_head) : nullptr;
      float* out = logits_.data() + at;
      if constexpr (K == kKeyPairs)
        if (a_.amx) {
          for (int t = 0; t < count; t += 2 * kLanes)
            matrix_logits(keys + t * head_dim_, head_dim_, packed_.data(), out + t, strip_stride_);
          continue;
        }
      tile_logits<K>(Tile<T>{keys, nullptr, 0, count}, width_, head_dim_, query_.data(), rows, out, strip_stride_,
                     next);
    }
  }

  const T* keys_of(int64_t block, int64_t kv_head) const {
    return (const T*)a_.cache + block * a_.block_stride + kv_head * a_.head_stride;
  }

  // A row's logits of a strip become weights, relative to the row's largest logit so far; `own` columns are its.
  void weigh(int row, int strip, int last, int64_t own) {
    float* logits = logits_.data() + row * strip_stride_;
    float* weights = weights_.data() + row * stride_ + long(strip) * strip_;
    const float scale = float(a_.scale) * 1.44269504088896341f;
    const int padded = (last + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = std::max<int64_t>(own, 0); t < padded; t++) logits[t] = kNothing / scale;
    Floats tops = broadcast(kNothing);
    for (int t = 0; t < padded; t += kLanes) tops = max(tops, load(logits + t) * scale);
    if (any_above(tops, top_[row])) {
      const float top = maximum(tops);
      totals_[row] *= broadcast(std::exp2(top_[row] - top));
      top_[row] = top;
    }
    Floats totals = totals_[row];
    const float top = tops_[long(strip) * kRows + row] = top_[row];
    for (int t = 0; t < padded; t += kLanes) {
      const Floats weight = exp2_nonpositive(load(logits + t) * scale - top);
      store(weights + t, weight);
      totals += weight;
    }
    totals_[row] = totals;
  }

  void add_strip(float* sums, int rows, int strip, int64_t count) {
    float shares[kRows];
    for (int row = 0; row < rows; row++) {
      const float top = tops_[long(strip) * kRows + row];
      shares[row] = (top == top_[row] ? 1.0f : std::exp2(top - top_[row])) / (total_[row] * float(a_.group));
    }
    const float* weights = weights_.data() + long(strip) * strip_;
    int64_t t = 0;
    for (; t + 4 * kLanes <= count; t += 4 * kLanes) add_columns_of<4>(weights + t, shares, rows, sums + t);
    for (; t + kLanes <= count; t += kLanes) add_columns_of<1>(weights + t, shares, rows, sums + t);
    for (; t < count; t++) {
      float total = 0;
      for (int row = 0; row < rows; row++) total += weights[row * stride_ + t] * shares[row];
      sums[t] += total;
    }
  }

  // Row by row, whose weights lie together; added up first, as small shares would be lost in a large sum.
  template <int V>
  void add_columns_of(const float* weights, const float* shares, int rows, float* sums) {
    Floats totals[V] = {};
    for (int row = 0; row < rows; row++, weights += stride_)
      for (int v = 0; v < V; v++) totals[v] += load(weights + v * kLanes) * shares[row];
    for (int v = 0; v < V; v++) store(sums + v * kLanes, load(sums + v * kLanes) + totals[v]);
  }

  const ColumnArguments& a_;
  int head_dim_, width_, strip_, strips_;
  long strip_stride_, stride_;
  Floats totals_[kRows];
  float top_[kRows], total_[kRows];
  std::vector<float> logits_, weights_, tops_, query_;
  std::vector<T> packed_;
};

template <class T, int K>
void add_columns(const ColumnArguments& a) {
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1 && a.kv_heads > 1)
  {
    Columns<T, K> columns(a);
    const auto work = [&] {
#pragma omp for schedule(dynamic, 1)
      for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++) columns.add(kv_head);
    };
    if (a.amx) {
      const Tiles tiles;
      work();
    } else {
      work();
    }
  }
}

}  // namespace

// Whether this build has matrix instructions; the caller must have asked the system for them (a.amx).
extern "C" int calidrop_has_amx() {
#if CALIDROP_AMX
  return 1;
#else
  return 0;
#endif
}

// 0, or 1 where there is no kernel for the element type and layout.
extern "C" int calidrop_add_column_sums(const ColumnArguments* a) {
  if (a->head_dim % kLanes || a->block_size % kLanes) return 1;
  if (a->dtype == kFloat32 && a->key_layout == kKeyTransposed)
    add_columns<float, kKeyTransposed>(*a);
  else if (a->dtype == kBFloat16 && a->key_layout == kKeyTransposed)
    add_columns<bf16, kKeyTransposed>(*a);
  else if (a->dtype == kBFloat16 && a->key_layout == kKeyPairs)
    add_columns<bf16, kKeyPairs>(*a);
#if CALIDROP_HAS_FP16
  else if (a->dtype == kFloat16 && a->key_layout == kKeyTransposed)
    add_columns<fp16, kKeyTransposed>(*a);
#endif
  else
    return 1;
  return 0;
}

extern "C" int64_t calidrop_column_arguments_bytes() { return sizeof(ColumnArguments); }

}  // namespace calidrop
