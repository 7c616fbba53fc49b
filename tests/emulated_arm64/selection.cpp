// Prints the tails that csrc/superquantile/selection.h finds in rows made of integers alone, bit by
// bit: what is printed must be the same on every kind of CPU. Fails where a threshold or a count is
// not that of the sorted row.
#include "superquantile/selection.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <functional>

namespace sqloss::superquantile::CPU_CAPABILITY {

// A row, followed by a block of losses of no mass.
template <typename T, typename W>
struct Row {
  using Loss = T;
  using Weight = W;
  struct Buffer {};

  std::vector<T> losses;
  std::vector<double> masses;
  std::vector<W> weights;

  int64_t size() const { return static_cast<int64_t>(masses.size()); }
  Run<T, W> run_at(int64_t begin, int64_t end, Buffer&) const {
    return {losses.data() + begin, kWeighted<W> ? weights.data() + begin : nullptr, end - begin,
            end - begin};
  }
  Run<T, W> whole(Items<T, W>&) const {
    Buffer buffer;
    return run_at(0, size(), buffer);
  }
  void sample(const int64_t* positions, int64_t size, Items<T, W>& items) const {
    for (int64_t i = 0; i < size; ++i) {
      items.losses.data()[i] = losses[positions[i]];
      if constexpr (kWeighted<W>) items.weights.data()[i] = weights[positions[i]];
    }
    items.size = size;
  }
};

template <typename T>
using Kind = std::function<T(int64_t i, int64_t n, uint64_t random)>;

// Exact in float: no library's rounding is in them.
template <typename T>
std::vector<std::pair<const char*, Kind<T>>> kinds() {
  using Limits = std::numeric_limits<T>;
  const auto bell = [](uint64_t random) {
    int64_t sum = 0;
    for (int shift = 0; shift < 64; shift += 16)
      sum += static_cast<int64_t>(random >> shift & 4095);
    return static_cast<T>(sum - 8192) / T(1024);
  };
  return {
      {"random", [=](int64_t, int64_t,
                     uint64_t r) { return bell(r) + static_cast<T>(r >> 50) / T(1 << 24); }},
      {"many ties", [=](int64_t, int64_t, uint64_t r) { return r % 10 < 7 ? T(1.5) : bell(r); }},
      {"sorted", [](int64_t i, int64_t, uint64_t) { return static_cast<T>(i); }},
      {"reversed", [](int64_t i, int64_t n, uint64_t) { return static_cast<T>(n - i); }},
      {"constant", [](int64_t, int64_t, uint64_t) { return T(0.75); }},
      {"two values", [](int64_t, int64_t, uint64_t r) { return static_cast<T>(r % 2); }},
      {"signed zeros", [](int64_t, int64_t, uint64_t r) { return r % 2 ? T(0) : -T(0); }},
      {"denormal",
       [](int64_t, int64_t, uint64_t r) { return static_cast<T>(r % 999) * Limits::denorm_min(); }},
      {"NaN, inf, -inf",
       [=](int64_t, int64_t, uint64_t r) {
         const T special[] = {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()};
         return r % 10 < 3 ? special[r % 3] : bell(r);
       }},
      {"mostly -inf",
       [=](int64_t, int64_t, uint64_t r) { return r % 10 < 9 ? -Limits::infinity() : bell(r); }},
      {"mostly NaN",
       [=](int64_t, int64_t, uint64_t r) { return r % 2 ? Limits::quiet_NaN() : bell(r); }},
  };
}

void print(double number) {
  uint64_t bits;
  if (core::is_nan(number)) number = std::numeric_limits<double>::quiet_NaN();
  std::memcpy(&bits, &number, sizeof(bits));
  std::printf(" %016" PRIx64, bits);
}

// Of counted items: by sorting.
template <typename T>
void check(std::vector<T> losses, int64_t n, double share, const Tail<T>& tail) {
  losses.resize(n);
  std::sort(losses.begin(), losses.end(), [](T a, T b) { return core::compare(a, b) > 0; });
  const T threshold = losses[static_cast<int64_t>(std::ceil(share * static_cast<double>(n))) - 1];
  int64_t above = 0, at = 0;
  for (const T loss : losses) {
    above += core::compare(loss, threshold) > 0;
    at += core::compare(loss, threshold) == 0;
  }
  const bool right = core::compare(tail.threshold, threshold) == 0 &&
                     tail.above == static_cast<double>(above) && tail.at == static_cast<double>(at);
  if (right) return;
  std::printf("expected %g with %" PRId64 " above and %" PRId64 " at it, got %g, %g, %g\n",
              static_cast<double>(threshold), above, at, static_cast<double>(tail.threshold),
              tail.above, tail.at);
  std::exit(1);
}

template <typename T, typename W>
void run(const char* types) {
  Room<T, W> room;
  for (const auto& [name, kind] : kinds<T>()) {
    for (const int64_t n : {1, 33, 8192, 8193, 40'001}) {
      Row<T, W> row;
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t random =
            hash(static_cast<uint64_t>(i) + 1'000'003 * static_cast<uint64_t>(n));
        row.losses.push_back(kind(i, n, random));
        row.masses.push_back(static_cast<double>(random >> 8 & 255) / 256);
        if (kWeighted<W> && row.masses.back() == 0) row.losses.back() = -kInfinity<T>;
      }
      row.losses.resize(n + kLanes, -kInfinity<T>);
      if constexpr (kWeighted<W>) {
        row.weights.assign(row.masses.begin(), row.masses.end());
        row.weights.resize(n + kLanes);
        row.weights[0] = 1;  // some weight in every row
        if (core::is_nan(row.losses[0])) row.losses[0] = 0;
      }
      for (const double share : {0.001, 0.25}) {
        const auto target = [=](double total) { return share * total; };
        const Tail<T> tail = select(row, share, target, Bracket<T>{}, room);
        if constexpr (!kWeighted<W>) check(row.losses, n, share, tail);
        std::printf("%s, %s, n = %" PRId64 ", %g:", types, name, n, share);
        for (const double number :
             {static_cast<double>(tail.threshold), tail.sum, tail.above, tail.at, tail.total}) {
          print(number);
        }
        std::printf("\n");
      }
    }
  }
}

}  // namespace sqloss::superquantile::CPU_CAPABILITY

int main() {
  namespace here = sqloss::superquantile::CPU_CAPABILITY;
  here::run<float, here::Unweighted>("float");
  here::run<double, here::Unweighted>("double");
  here::run<float, float>("float, float weights");
  here::run<float, double>("float, double weights");
  here::run<double, double>("double, double weights");
}
