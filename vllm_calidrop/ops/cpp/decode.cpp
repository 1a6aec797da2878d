// One decode step of one layer for a whole batch (Algorithm 2): the kept tokens' state, the gate, recomputation, merge.
// The meaning is ops/cpu.py's; the arithmetic of the gate is calibration.py's.

#include "attend.h"
#include "encoded.h"

namespace calidrop {
namespace {

constexpr int kPageTokens = 16;
constexpr int kCounters = 4;  // recomputes, merges, plain, group_reads
constexpr int kSkipped = 5;
enum Gate { kGroup = 0, kHead = 1, kGroupMean = 2 };

}  // namespace

// The fields, their order and their types are those of native/__init__.py::_Arguments.
extern "C" struct Arguments {
  int64_t dtype, key_layout, value_layout, threads;
  int64_t rows, kv_heads, group, head_dim, block_size;
  double scale;
  const void* query;  // [rows, kv_heads, group, D], rows query_stride apart
  int64_t query_stride;
  void* out;  // the same shape, rows out_stride apart; float32, or the element type
  int64_t out_stride, out_float32;
  float* lse;  // [rows, kv_heads, group] of all that was attended, or null
  // vLLM's cache, packed: a region of 2 * block_size * D elements per (block, KV head).
  const void* cache;
  int64_t block_stride, head_stride;
  const int32_t* blocks;  // [rows, columns], by rows of blocks_stride
  int64_t blocks_stride;
  const int64_t *start, *end;  // [rows]: the attended tokens, counted from the first column
  // Rows that have a calibration state; the arrays below are over those.
  int64_t calibrated_rows;
  const int64_t *calibrated, *slots;
  const float *theta1, *theta2;
  const int64_t* gate;
  const int64_t* swap_blocks;
  int64_t swap_stride;
  const int64_t* stored;
  const int64_t* codec;       // numbers of codecs; null: all are none
  const int64_t* most_reads;  // KV heads whose evicted KV a row may read; null: all
  // This layer's part of the swap pool: [blocks, kv_heads] blocks of block_bytes; of codec none they are
  // [pages, 2, 16, D].
  const void* pages;
  int64_t pages_per_block, block_bytes;
  const CodecLayout* codecs;  // by their numbers
  // This layer's part of the state table: [slots, kv_heads, group(, D)]; counts by slots of counts_stride.
  void* state_query;
  float *state_out, *state_lse;
  int64_t* counts;
  int64_t counts_stride;
  // Histogram of the similarities: per bound, above the last, and their sum in millionths.
  const float* similarity_bounds;
  int64_t* similarity;
  int64_t similarity_buckets;
};

namespace {

// What one thread needs for one (row, KV head).
template <class T>
struct Scratch {
  explicit Scratch(const Arguments& a)
      : query(a.group * a.head_dim),
        out(a.group * a.head_dim),
        asked(a.group * a.head_dim),
        renewed(a.group * a.head_dim),
        lse(a.group),
        renewed_lse(a.group),
        rho(a.group),
        recompute(a.group),
        merge(a.group) {}
  std::vector<float> query, out, asked, renewed, lse, renewed_lse, rho;
  std::vector<char> recompute, merge;
  Workspace<T> space;
  EncodedSpace encoded;
};

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

// barred: the read budget keeps the group from recomputing.
template <class T>
void decide(Scratch<T>& s, int group, float theta1, float theta2, int64_t gate, bool barred) {
  float low = kInf, mean = 0;
  for (int h = 0; h < group; h++) low = std::min(low, s.rho[h]), mean += s.rho[h];
  mean /= group;
  for (int h = 0; h < group; h++) {
    const float for_recompute = gate == kGroup ? low : gate == kHead ? s.rho[h] : mean;
    const float for_merge = gate == kGroupMean ? mean : s.rho[h];
    s.recompute[h] = !barred && for_recompute < theta1;
    s.merge[h] = !s.recompute[h] && for_merge > theta2;
  }
}

template <class T, int K, int V>
void attend_kept(const Arguments& a, int64_t row, int64_t kv_head, Scratch<T>& s, float* out) {
  const int width = int(a.block_size), head_dim = int(a.head_dim);
  Attention<T> attention(s.space, s.query.data(), int(a.group), head_dim, float(a.scale), width, out, s.lse.data());
  const int32_t* blocks = a.blocks + row * a.blocks_stride;
  const int64_t start = a.start[row], end = a.end[row];
  for (int64_t column = start / width; column * width < end; column++) {
    const T* keys = (const T*)a.cache + blocks[column] * a.block_stride + kv_head * a.head_stride;
    const int64_t base = column * width;
    attention.add({keys, keys + long(width) * head_dim, int(std::max<int64_t>(start - base, 0)),
                                  int(std::min<int64_t>(end - base, width))});
  }
  attention.template finish<K, V>();
}

// The states of the first `heads` queries of s.asked over a KV head's evicted tokens, page by page where they lie.
template <class T>
void attend_evicted(const Arguments& a, int64_t index, int64_t kv_head, int heads, Scratch<T>& s) {
  const int head_dim = int(a.head_dim);
  const int64_t page_elements = 2 * kPageTokens * head_dim, stored = a.stored[index];
  const int64_t* blocks = a.swap_blocks + index * a.swap_stride;
  Attention<T> attention(s.space, s.asked.data(), heads, head_dim, float(a.scale), kPageTokens, s.renewed.data(),
                         s.renewed_lse.data());
  for (int64_t first = 0; first < stored; first += kPageTokens) {
    const int64_t page = first / kPageTokens, block = blocks[page / a.pages_per_block];
    const T* keys = (const T*)a.pages +
                    ((block * a.kv_heads + kv_head) * a.pages_per_block + page % a.pages_per_block) * page_elements;
    attention.add(
        {keys, keys + kPageTokens * head_dim, 0, int(std::min<int64_t>(stored - first, kPageTokens))});
  }
  attention.template finish<kKeyPlain, kValuePlain>();
}

// The same of a KV head's encoded tokens, group by group.
template <class T>
void attend_codes(const Arguments& a, int64_t index, int64_t kv_head, int heads, Scratch<T>& s) {
  const CodecLayout& layout = a.codecs[a.codec[index]];
  const int64_t* blocks = a.swap_blocks + index * a.swap_stride;
  s.encoded.groups.clear();
  for (int64_t first = 0, pages; first < a.stored[index]; first += pages * kPageTokens) {
    const int64_t block = first / kPageTokens / layout.pages_per_block, page = first / kPageTokens % layout.pages_per_block;
    const uint8_t* at = (const uint8_t*)a.pages + (blocks[block] * a.kv_heads + kv_head) * a.block_bytes;
    pages = std::min(layout.pages_per_group, layout.pages_per_block - page);
    s.encoded.groups.push_back({at + page / layout.pages_per_group * layout.group_bytes,
                                int(std::min(a.stored[index] - first, pages * kPageTokens))});
  }
  attend_encoded<T>(s.encoded, layout, s.encoded.groups, s.asked.data(), heads, int(a.head_dim), float(a.scale),
                    s.renewed.data(), s.renewed_lse.data());
}

template <class T>
void recompute(const Arguments& a, int64_t index, int64_t kv_head, const T* query, int64_t state, Scratch<T>& s) {
  const int head_dim = int(a.head_dim), group = int(a.group);
  int asking = 0;
  for (int h = 0; h < group; h++)
    if (s.recompute[h])
      std::copy_n(s.query.data() + h * head_dim, head_dim, s.asked.data() + asking++ * head_dim);
  if (!asking) return;
  if (a.codec && a.codec[index])
    attend_codes<T>(a, index, kv_head, asking, s);
  else
    attend_evicted<T>(a, index, kv_head, asking, s);
  for (int h = 0, from = 0; h < group; h++)
    if (s.recompute[h]) {
      std::copy_n(query + h * head_dim, head_dim, (T*)a.state_query + (state + h) * head_dim);
      std::copy_n(s.renewed.data() + from * head_dim, head_dim, a.state_out + (state + h) * head_dim);
      a.state_lse[state + h] = s.renewed_lse[from++];
    }
}

template <class T>
void count(const Arguments& a, int64_t slot, const Scratch<T>& s) {
  int64_t recomputes = 0, merges = 0;
  for (int h = 0; h < a.group; h++) recomputes += s.recompute[h], merges += s.merge[h];
  const int64_t add[kCounters] = {recomputes, merges, a.group - recomputes - merges, recomputes > 0};
  for (int i = 0; i < kCounters; i++)
    if (add[i]) __atomic_fetch_add(a.counts + slot * a.counts_stride + i, add[i], __ATOMIC_RELAXED);
}

// The similarities of one KV head, as measures.py counts them: NaN is none, rounding may exceed 1.
template <class T>
void observe(const Arguments& a, const Scratch<T>& s) {
  for (int h = 0; h < a.group; h++) {
    if (std::isnan(s.rho[h])) continue;
    const float rho = std::min(s.rho[h], 1.0f);
    int64_t bucket = 0;
    while (bucket < a.similarity_buckets && rho > a.similarity_bounds[bucket]) bucket++;
    __atomic_fetch_add(a.similarity + bucket, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(a.similarity + a.similarity_buckets + 1, std::llround(rho * 1e6), __ATOMIC_RELAXED);
  }
}

// out, lse become the state over kept and evicted tokens (equation 1).
void merge_into(float* out, float& lse, const float* other, float other_lse, int head_dim) {
  const float top = std::max(lse, other_lse);
  if (top == -kInf) return;
  const float mine = std::exp(lse - top), its = std::exp(other_lse - top), total = mine + its;
  const float my_share = mine / total, its_share = its / total;
  for (int d = 0; d < head_dim; d++) out[d] = out[d] * my_share + other[d] * its_share;
  lse = top + std::log(total);
}

template <class T>
void load_query(const Arguments& a, int64_t row, int64_t kv_head, Scratch<T>& s) {
  const int64_t elements = a.group * a.head_dim;
  const T* query = (const T*)a.query + row * a.query_stride + kv_head * elements;
  for (int64_t i = 0; i < elements; i++) s.query[i] = to_float(query[i]);
}

// Similarities and decisions of a KV head, from the queries in the scratch.
template <class T>
void decide(const Arguments& a, int64_t index, int64_t kv_head, bool barred, Scratch<T>& s) {
  const int head_dim = int(a.head_dim), group = int(a.group);
  const int64_t state = (a.slots[index] * a.kv_heads + kv_head) * group;
  for (int h = 0; h < group; h++)
    s.rho[h] = cosine(s.query.data() + h * head_dim, (const T*)a.state_query + (state + h) * head_dim, head_dim);
  decide(s, group, a.theta1[index], a.theta2[index], a.gate[index], barred);
}

// Which KV heads of the calibrated rows the read budget keeps from recomputing, [calibrated_rows, kv_heads]: all that
// want but the most_reads of lowest similarity, ties to the lower head. Empty without budgets.
template <class T>
std::vector<char> over_budget(const Arguments& a) {
  std::vector<char> barred(a.most_reads ? a.calibrated_rows * a.kv_heads : 0);
  if (barred.empty()) return barred;
  Scratch<T> s(a);
  std::vector<std::pair<float, int64_t>> wants;
  for (int64_t i = 0; i < a.calibrated_rows; i++) {
    if (a.most_reads[i] >= a.kv_heads) continue;
    wants.clear();
    for (int64_t head = 0; head < a.kv_heads; head++) {
      load_query(a, a.calibrated[i], head, s);
      decide(a, i, head, false, s);
      if (std::find(s.recompute.begin(), s.recompute.end(), char(1)) == s.recompute.end()) continue;
      float similarity = *std::min_element(s.rho.begin(), s.rho.end());
      if (a.gate[i] == kGroupMean) {
        similarity = 0;
        for (const float rho : s.rho) similarity += rho;
        similarity /= a.group;
      }
      wants.push_back({similarity, head});
    }
    std::sort(wants.begin(), wants.end());
    for (size_t j = a.most_reads[i]; j < wants.size(); j++) {
      barred[i * a.kv_heads + wants[j].second] = 1;
      a.counts[a.slots[i] * a.counts_stride + kSkipped]++;
    }
  }
  return barred;
}

template <class T>
void calibrate(const Arguments& a, int64_t index, int64_t kv_head, bool barred, const T* query, Scratch<T>& s,
               float* out) {
  const int head_dim = int(a.head_dim), group = int(a.group);
  const int64_t slot = a.slots[index], state = (slot * a.kv_heads + kv_head) * group;
  decide(a, index, kv_head, barred, s);
  count(a, slot, s);
  observe(a, s);
  recompute(a, index, kv_head, query, state, s);
  for (int h = 0; h < group; h++)
    if (s.recompute[h] || s.merge[h])
      merge_into(out + h * head_dim, s.lse[h], a.state_out + (state + h) * head_dim, a.state_lse[state + h], head_dim);
}

template <class T, int K, int V>
void decode(const Arguments& a) {
  const int64_t pairs = a.rows * a.kv_heads, elements = a.group * a.head_dim;
  std::vector<int64_t> index_of(a.rows, -1);
  for (int64_t i = 0; i < a.calibrated_rows; i++) index_of[a.calibrated[i]] = i;
  const std::vector<char> barred = over_budget<T>(a);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1 && pairs > 1)
  {
    Scratch<T> s(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t row = pair / a.kv_heads, kv_head = pair % a.kv_heads;
      const T* query = (const T*)a.query + row * a.query_stride + kv_head * elements;
      float* out = s.out.data();
      load_query(a, row, kv_head, s);
      attend_kept<T, K, V>(a, row, kv_head, s, out);
      const int64_t index = index_of[row];
      if (index >= 0)
        calibrate<T>(a, index, kv_head, !barred.empty() && barred[index * a.kv_heads + kv_head], query, s, out);
      const int64_t place = row * a.out_stride + kv_head * elements;
      if (a.out_float32)
        std::copy_n(out, elements, (float*)a.out + place);
      else
        for (int64_t i = 0; i < elements; i++) from_float(out[i], (T*)a.out + place + i);
      if (a.lse) std::copy_n(s.lse.data(), a.group, a.lse + pair * a.group);
    }
  }
}

}  // namespace

// 0, or 1 where there is no kernel for the element type and layout.
extern "C" int calidrop_decode(const Arguments* a) {
  const bool transposed = a->key_layout == kKeyTransposed && a->value_layout == kValuePlain;
  if (a->head_dim % kLanes || a->block_size % kLanes) return 1;
  if (a->dtype == kFloat32 && transposed)
    decode<float, kKeyTransposed, kValuePlain>(*a);
  else if (a->dtype == kBFloat16 && transposed)
    decode<bf16, kKeyTransposed, kValuePlain>(*a);
  else if (a->dtype == kBFloat16 && a->key_layout == kKeyPairs && a->value_layout == kValuePairs)
    decode<bf16, kKeyPairs, kValuePairs>(*a);
#if CALIDROP_HAS_FP16
  else if (a->dtype == kFloat16 && transposed)
    decode<fp16, kKeyTransposed, kValuePlain>(*a);
#endif
  else
    return 1;
  return 0;
}

extern "C" int64_t calidrop_arguments_bytes() { return sizeof(Arguments); }

}  // namespace calidrop
