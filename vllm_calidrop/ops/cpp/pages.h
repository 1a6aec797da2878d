// Which pages a look wants, and where they go in the page buffer. The meaning is evicted/recall/looks.py::wanted_pages' and
// evicted/recall/buffer.py's.
#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"
#include "sketch.h"

namespace calidrop {

// eps and most, or top_p (NaN: eps) and most.
struct Choice {
  float eps, top_p;
  int64_t most;
};

class WantedPages {
 public:
  // The wanted pages, largest share first; ties go to the lower page.
  const std::vector<int64_t>& choose(const PageShares& shares, const Choice& choice) {
    const bool top_k = choice.top_p != choice.top_p;
    largest_.resize(shares.pages());
    order_.clear();
    for (int64_t page = 0; page < shares.pages(); page++) {
      float largest = shares.of(0, page);
      for (int h = 1; h < shares.heads(); h++) largest = std::max(largest, shares.of(h, page));
      largest_[page] = largest;
      if (!top_k || largest > choice.eps) order_.push_back(page);
    }
    const auto before = [this](int64_t a, int64_t b) {
      return largest_[a] != largest_[b] ? largest_[a] > largest_[b] : a < b;
    };
    const int64_t most = std::min<int64_t>(choice.most, order_.size());
    if (top_k) {
      std::partial_sort(order_.begin(), order_.begin() + most, order_.end(), before);
      order_.resize(most);
    } else {
      std::sort(order_.begin(), order_.end(), before);
      order_.resize(std::min(most, enough(shares, 1 - choice.top_p)));
    }
    return order_;
  }

 private:
  // How many of the pages in order leave every head at most `unread` of its attention.
  int64_t enough(const PageShares& shares, float unread) {
    left_.assign(shares.heads(), 0.0f);
    for (int64_t count = shares.pages(); count > 0; count--)
      for (int h = 0; h < shares.heads(); h++)
        if ((left_[h] += shares.of(h, order_[count - 1])) > unread) return count;
    return 0;
  }

  std::vector<float> largest_, left_;
  std::vector<int64_t> order_;
};

// The places of one KV head's page buffer, at most kMost. place[i] for each of `wanted`: where it must be put, -1: nowhere.
class BufferPlaces {
 public:
  static constexpr int kMost = kMaxBuffer;

  // held, rank: [size], by place; renewed. A page keeps its place; the newest wanted pages stay.
  const std::vector<int>& renew(int64_t* held, int64_t* rank, int size, const std::vector<int64_t>& wanted) {
    place_.assign(wanted.size(), -1);
    int64_t stays[kMost] = {};  // by place, the new rank + 1
    int64_t position = 0;
    std::vector<int>& comes = comes_;
    comes.clear();
    for (size_t i = 0; i < wanted.size() && position < size; i++, position++) {
      const int64_t* at = std::find(held, held + size, wanted[i]);
      if (at == held + size)
        comes.push_back(int(i));
      else
        stays[at - held] = position + 1;
    }
    by_age_.clear();
    for (int j = 0; j < size; j++)
      if (held[j] != kEmpty && std::find(wanted.begin(), wanted.end(), held[j]) == wanted.end()) by_age_.push_back(j);
    std::sort(by_age_.begin(), by_age_.end(), [rank](int a, int b) { return rank[a] < rank[b]; });
    for (size_t i = 0; i < by_age_.size() && position < size; i++) stays[by_age_[i]] = ++position;

    size_t next = 0;
    for (int j = 0; j < size; j++) {
      if (stays[j]) {
        rank[j] = stays[j] - 1;
      } else if (next < comes.size()) {
        held[j] = wanted[comes[next]], rank[j] = comes[next];
        place_[comes[next++]] = j;
      } else {
        held[j] = kEmpty, rank[j] = kOldest;
      }
    }
    return place_;
  }

 private:
  std::vector<int> place_, comes_, by_age_;
};

}  // namespace calidrop
