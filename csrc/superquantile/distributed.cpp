#include "superquantile/distributed.h"

#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "core/tensors.h"
#include "core/total_order.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile {
namespace {

using core::from_ordered_key;
using core::ordered_key_t;
using core::to_ordered_key;

// Bits of the digits of a key, from the leading one. The first has as many whatever the dtype.
constexpr int kFirst = 11;
constexpr int64_t kFirstBins = int64_t(1) << kFirst;
template <typename Key>
constexpr auto kDigits = std::array{kFirst, 11, 10};
template <>
constexpr auto kDigits<uint64_t> = std::array{kFirst, 11, 11, 11, 10, 10};
template <>
constexpr auto kDigits<uint16_t> = std::array{kFirst, 5};

// A number of magnitude below 1 is so many integers of so many bits each, whose sums are exact.
constexpr int kLimb = 28;
constexpr int64_t kMostLosses = int64_t(1) << (62 - kLimb);  // of which a sum of limbs fits
using Limbs = std::array<int64_t, 3>;

Limbs to_limbs(double x) {
  constexpr double scale = int64_t(1) << kLimb;
  Limbs limbs;
  for (int64_t& limb : limbs) {
    x *= scale;
    limb = static_cast<int64_t>(x);
    x -= static_cast<double>(limb);  // exact: what is left are the lower bits
  }
  return limbs;
}

double to_real(Limbs sums) {
  constexpr double scale = 1.0 / (int64_t(1) << kLimb);
  constexpr int64_t bits = (int64_t(1) << kLimb) - 1;
  sums[1] += sums[2] >> kLimb;
  sums[0] += sums[1] >> kLimb;
  const auto middle = static_cast<double>(sums[1] & bits);
  const auto low = static_cast<double>(sums[2] & bits);
  return (static_cast<double>(sums[0]) + (middle + low * scale) * scale) * scale;
}

double power_of_two(int64_t exponent) { return std::bit_cast<double>((exponent + 1023) << 52); }

// x * 2^exponent for exponents up to 2,000, where 2^exponent may be out of range.
double times_power_of_two(double x, int64_t exponent) {
  const int64_t half = exponent >> 1;
  return x * power_of_two(half) * power_of_two(exponent - half);
}

// Masses: of unweighted losses their number, else limbs.
struct Number {
  static constexpr int64_t kParts = 1;
  int64_t parts[kParts] = {0};

  double real() const { return static_cast<double>(parts[0]); }
  // The sum of as many x, of which each counts to its last limb.
  Limbs times(double x) const {
    Limbs limbs = to_limbs(x);
    for (int64_t& limb : limbs) limb *= parts[0];
    return limbs;
  }
};
struct Weight {
  static constexpr int64_t kParts = 3;
  int64_t parts[kParts] = {0, 0, 0};

  double real() const { return to_real({parts[0], parts[1], parts[2]}); }
  Limbs times(double x) const { return to_limbs(x * real()); }
};

// [parts, bins] of a payload
template <typename Mass>
struct Histogram {
  int64_t* data;
  int64_t bins;

  void add(int64_t bin, const Mass& mass) {
    for (const auto i : c10::irange(Mass::kParts)) data[i * bins + bin] += mass.parts[i];
  }
  Mass at(int64_t bin) const {
    Mass mass;
    for (const auto i : c10::irange(Mass::kParts)) mass.parts[i] = data[i * bins + bin];
    return mass;
  }
};

// What ranks add up, one payload after another.
class Payload {
 public:
  const std::string& function;  // that was called

  Payload(const std::string& function, const std::function<void(const at::Tensor&)>& all_reduce)
      : function(function), all_reduce_(all_reduce) {}

  // Zeros, of which this rank's own part is to be written before the sum. The last payload is gone.
  int64_t* begin(int64_t size) {
    tensor_.reset();  // the new one may take its memory, which is in the cache
    tensor_ = at::empty({size}, at::kLong);
    auto* const data = tensor_.mutable_data_ptr<int64_t>();
    std::fill_n(data, size, 0);
    return data;
  }
  void reduce() { all_reduce_(tensor_); }

 private:
  at::Tensor tensor_;
  const std::function<void(const at::Tensor&)>& all_reduce_;
};

// The first payload: what ranks must agree on with its square, the number of losses, that of
// invalid weights, and a histogram.
class Agreement {
 public:
  const std::string& function;  // that was called

  Agreement(const std::vector<int64_t>& config, int64_t ranks, Payload& payload,
            const std::function<void(const at::Tensor&)>& disagree)
      : function(payload.function),
        config_(config),
        ranks_(ranks),
        payload_(payload),
        disagree_(disagree) {
    int64_t* data = payload.begin(2 * static_cast<int64_t>(config.size()) + 2 + kFirstBins);
    for (const int64_t number : config) *data++ = number;
    for (const int64_t number : config) *data++ = number * number;
    losses = data++;
    invalid = data++;
    histogram = data;
  }

  void reduce() {
    payload_.reduce();
    const auto count = static_cast<int64_t>(config_.size());
    const int64_t* const sums = losses - 2 * count;
    const auto agree = [&](int64_t i) {
      return sums[i] == config_[i] * ranks_ && sums[count + i] == config_[i] * config_[i] * ranks_;
    };
    bool all = true;
    for (const auto i : c10::irange(count)) all &= agree(i);
    if (!all) {
      const at::Tensor equal = at::empty({count}, at::kBool);
      for (const auto i : c10::irange(count)) equal.mutable_data_ptr<bool>()[i] = agree(i);
      disagree_(equal);
    }
    TORCH_CHECK_VALUE(*losses <= kMostLosses, function, ": losses: expected at most ", kMostLosses,
                      " on all ranks together, got ", *losses);
  }

  int64_t* losses;
  int64_t* invalid;
  int64_t* histogram;

 private:
  const std::vector<int64_t>& config_;
  int64_t ranks_;
  Payload& payload_;
  const std::function<void(const at::Tensor&)>& disagree_;
};

// e such that 2^e bounds the finite losses with this first digit.
template <typename T>
int64_t exponent_of(int64_t digit) {
  using Key = ordered_key_t<T>;
  constexpr int shift = 8 * sizeof(Key) - kFirst;
  const Key lowest = static_cast<Key>(static_cast<Key>(digit) << shift);
  const Key highest = static_cast<Key>(lowest + ((Key(1) << shift) - 1));
  const auto largest = static_cast<double>(std::numeric_limits<T>::max());
  double bound = 0;
  bool some = false;
  for (const Key key : {lowest, highest}) {
    const double x = std::abs(static_cast<double>(from_ordered_key<T>(key)));
    some |= std::isfinite(x);
    bound = std::max(bound, std::isfinite(x) ? x : largest);
  }
  int exponent = 0;
  std::frexp(some ? bound : 0.0, &exponent);
  return exponent;
}

// The losses that count, as keys, and how much.
template <typename Key, typename Mass>
struct Item {
  Key key;

  Mass mass() const { return {{1}}; }
  Limbs times(double x) const { return to_limbs(x); }
};
template <typename Key>
struct Item<Key, Weight> {
  Key key;
  double weight;  // below 1, in units of 2^unit

  Weight mass() const {
    const Limbs limbs = to_limbs(weight);
    return {{limbs[0], limbs[1], limbs[2]}};
  }
  Limbs times(double x) const { return to_limbs(x * weight); }
};

template <typename T, typename Mass>
struct Items {
  std::vector<Item<ordered_key_t<T>, Mass>> items;
  int64_t unit = 0;

  Items(const at::Tensor& losses, const std::optional<at::Tensor>& mask,
        const std::optional<at::Tensor>& weight, Agreement& agreement) {
    const int64_t n = losses.numel();
    const T* const x = losses.const_data_ptr<T>();
    const auto* const keep = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    items.reserve(n);
    *agreement.losses = n;
    const auto each = [&](const auto& add) {
      for (const auto i : c10::irange(n)) {
        const T loss = x[i] + T(0);  // -0 is 0
        if (keep == nullptr || keep[i] != 0) add(i, to_ordered_key(loss));
      }
    };
    if constexpr (std::is_same_v<Mass, Number>) {
      each([&](int64_t, auto key) { items.push_back({key}); });
    } else {
      const double* const w = weight->const_data_ptr<double>();
      each([&](int64_t i, auto key) {
        if (w[i] > 0 && std::isfinite(w[i])) {
          items.push_back({key, w[i]});
        } else {
          *agreement.invalid += !(w[i] == 0);
        }
      });
      scale(agreement);
    }
  }

 private:
  // A round of its own: the unit is that of the largest weight of all ranks.
  void scale(Agreement& agreement) {
    constexpr int lowest = 1 - kFirstBins / 2;  // of the exponents that have a bin
    for (const auto& item : items) {
      int exponent = 0;
      std::frexp(item.weight, &exponent);
      ++agreement.histogram[std::max(exponent, lowest) - lowest];
    }
    agreement.reduce();
    TORCH_CHECK_VALUE(*agreement.invalid == 0, agreement.function,
                      ": weight: expected finite values >= 0");
    for (const auto bin : c10::irange(kFirstBins)) {
      if (agreement.histogram[bin] > 0) unit = bin + lowest;
    }
    for (auto& item : items) item.weight = times_power_of_two(item.weight, -unit);
  }
};

template <typename T, typename Mass>
class Search {
 public:
  using Key = ordered_key_t<T>;

  Search(const Items<T, Mass>& items, double tail_fraction, Payload& payload)
      : items_(items), fraction_(tail_fraction), payload_(payload) {}

  void run(Agreement& agreement) {
    if constexpr (std::is_same_v<Mass, Number>) {
      begin({agreement.histogram, kFirstBins}, [&] { agreement.reduce(); }, kAlphaRounding);
    } else {
      const auto n = static_cast<double>(*agreement.losses);  // before its memory is taken
      begin(
          {payload_.begin(Mass::kParts * kFirstBins), kFirstBins}, [&] { payload_.reduce(); },
          kAlphaRounding + n * kSumRounding);
    }
    for (size_t i = 1; i + 1 < kDigits<Key>.size(); ++i) {
      const int width = kDigits<Key>[i];
      const Histogram<Mass> histogram = within_prefix(width, 0);
      payload_.reduce();
      descend(histogram, width);
    }
    end();
  }

  double value() const {
    const double above = above_.real();
    const double k = tail();
    const double rest = k - above;
    const auto t = static_cast<double>(threshold_);
    double value =
        (to_real(sums_) + (rest > 0 ? rest * times_power_of_two(t, -exponent_) : 0.0)) / k;
    value = times_power_of_two(value, exponent_);
    if (above == 0) value = t;  // the maximum, exactly
    if (infinite_ && t < std::numeric_limits<double>::infinity()) {
      value = std::numeric_limits<double>::infinity();  // even where t is -inf
    }
    return nan_ ? std::numeric_limits<double>::quiet_NaN() : value;
  }
  T threshold() const { return threshold_; }
  Counts counts() const {
    const auto real = [&](double mass) { return times_power_of_two(mass, items_.unit); };
    return {real(above_.real()), real(at_.real()), real(tail())};
  }

 private:
  void begin(Histogram<Mass> histogram, const auto& reduce, double rounding) {
    for (const auto& item : items_.items) {
      histogram.add(item.key >> shift_, item.mass());
    }
    reduce();
    Mass total;
    for (const auto bin : c10::irange(kFirstBins)) add(total, histogram.at(bin));
    total_ = total.real();
    TORCH_CHECK_VALUE(total_ > 0, payload_.function,
                      ": losses: expected one that counts on any of the "
                      "ranks, got none");
    TORCH_CHECK_VALUE(std::isfinite(times_power_of_two(total_, items_.unit)), payload_.function,
                      ": weight: expected a finite sum over all ranks");
    target_ = tail_target(fraction_, total_, rounding);
    descend(histogram, 0);
    exponent_ = std::numeric_limits<int64_t>::min();
    for (int64_t bin = static_cast<int64_t>(prefix_); bin < kFirstBins; ++bin) {
      if (is_some(histogram.at(bin))) exponent_ = std::max(exponent_, exponent_of<T>(bin));
    }
  }

  // That of the digits after the prefix, of the keys that begin with it, in a new payload with
  // place for some more integers behind.
  Histogram<Mass> within_prefix(int width, int64_t more) {
    shift_ -= width;
    const int64_t bins = int64_t(1) << width;
    Histogram<Mass> histogram{payload_.begin(Mass::kParts * bins + more), bins};
    const auto low = static_cast<Key>(histogram.bins - 1);
    for (const auto& item : items_.items) {
      const auto digits = static_cast<Key>(item.key >> shift_);
      if (static_cast<Key>(digits >> width) != prefix_) continue;
      histogram.add(digits & low, item.mass());
    }
    return histogram;
  }

  // To the highest digit from which on the mass reaches the target.
  void descend(const Histogram<Mass>& histogram, int width) {
    int64_t digit = histogram.bins;
    do {
      --digit;
      at_ = histogram.at(digit);
      Mass reached = above_;
      add(reached, at_);
      if (reached.real() >= target_) break;
      above_ = reached;
    } while (digit > 0);
    prefix_ = static_cast<Key>((prefix_ << width) | static_cast<Key>(digit));
  }

  // The last round, before which only losses of its histogram are not known to be above the
  // threshold or not, and whose bins are keys.
  void end() {
    constexpr int width = kDigits<Key>.back();
    constexpr int64_t bins = int64_t(1) << width;
    const Histogram<Mass> histogram = within_prefix(width, kSums);
    int64_t* const sums = histogram.data + Mass::kParts * bins;
    int64_t* const special = sums + 3;
    const Key prefix = prefix_;
    for (const auto& item : items_.items) {
      if (static_cast<Key>(item.key >> width) < prefix) continue;
      const auto x = static_cast<double>(from_ordered_key<T>(item.key));
      special[0] += x == std::numeric_limits<double>::infinity();
      special[1] += std::isnan(x);
      // Of a mass that is cut off to 0 the exponent may not be in the bound
      if (static_cast<Key>(item.key >> width) > prefix && std::isfinite(x) &&
          is_some(item.mass())) {
        add_limbs(sums, item.times(times_power_of_two(x, -exponent_)));
      }
    }
    payload_.reduce();
    infinite_ = special[0] > 0;
    nan_ = special[1] > 0;
    descend(histogram, width);
    threshold_ = from_ordered_key<T>(prefix_);
    for (int64_t digit = (prefix_ & (bins - 1)) + 1; digit < bins; ++digit) {
      const Mass mass = histogram.at(digit);
      if (!is_some(mass)) continue;
      const auto key = static_cast<Key>((prefix << width) | static_cast<Key>(digit));
      const auto x = static_cast<double>(from_ordered_key<T>(key));
      if (!std::isfinite(x)) continue;
      add_limbs(sums, mass.times(times_power_of_two(x, -exponent_)));
    }
    std::copy_n(sums, 3, sums_.begin());
  }

  static bool is_some(const Mass& mass) {
    return std::any_of(mass.parts, mass.parts + Mass::kParts,
                       [](int64_t part) { return part > 0; });
  }
  static void add(Mass& sum, const Mass& mass) {
    for (const auto i : c10::irange(Mass::kParts)) sum.parts[i] += mass.parts[i];
  }
  static void add_limbs(int64_t* sums, const Limbs& limbs) {
    for (const auto i : c10::irange(3)) sums[i] += limbs[i];
  }

  double tail() const {
    const double above = above_.real();
    return std::min(std::max(fraction_ * total_, above), above + at_.real());
  }

  static constexpr int64_t kSums = 5;  // the last payload's, behind the histogram

  const Items<T, Mass>& items_;
  double fraction_;
  Payload& payload_;
  double total_ = 0, target_ = 0;
  int shift_ = 8 * sizeof(Key) - kFirst;
  Key prefix_ = 0;        // the digits of the threshold that are known
  Mass above_, at_;       // of all keys that begin with more, and with these
  int64_t exponent_ = 0;  // 2^this bounds the finite losses that are not below
  Limbs sums_{};          // of what lies above the threshold, over that
  bool infinite_ = false, nan_ = false;
  T threshold_ = 0;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> distributed(
    const at::Tensor& losses, double tail_fraction, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& mask, const std::vector<int64_t>& config, int64_t ranks,
    int64_t scale, const std::function<void(const at::Tensor&)>& all_reduce,
    const std::function<void(const at::Tensor&)>& disagree, const std::string& function) {
  TORCH_CHECK_NOT_IMPLEMENTED(losses.has_storage(), function,
                              ": losses: expected a tensor of this process (transforms of "
                              "torch.func are not implemented), got one without storage");
  const at::Tensor x = losses.contiguous();
  std::optional<at::Tensor> w, m;
  if (weight) w = weight->to(at::kDouble).contiguous();
  if (mask) m = mask->contiguous();

  at::Tensor value = at::empty({}, x.options()), threshold = at::empty({}, x.options());
  at::Tensor counts = at::empty({3}, x.options().dtype(at::kDouble));
  core::for_dtype(core::dtype_of(x.scalar_type()), [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto mass) {
      Payload payload(function, all_reduce);
      Agreement agreement(config, ranks, payload, disagree);
      const Items<T, decltype(mass)> items(x, m, w, agreement);
      Search<T, decltype(mass)> found(items, tail_fraction, payload);
      found.run(agreement);
      *value.mutable_data_ptr<T>() = c10::convert<T>(found.value());
      *threshold.mutable_data_ptr<T>() = found.threshold();
      const Counts of_all = found.counts();
      double* const into = counts.mutable_data_ptr<double>();
      const auto over = static_cast<double>(scale);
      into[0] = of_all.above / over;
      into[1] = of_all.at / over;
      into[2] = of_all.tail / over;
    };
    if (w) {
      run(Weight());
    } else {
      run(Number());
    }
  });
  return {value, threshold, counts};
}

}  // namespace sqloss::superquantile
