#include "cpu/streamed_rank.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/aten.h"
#include "cpu/dense.h"
#include "cpu/projector.h"
#include "cpu/short_products.h"
#include "cpu/singular_values.h"
#include "cpu/stage.h"
#include "cpu/streamed.h"

namespace dse::cpu {
namespace {

// Whether float32 products are worth a try: not where a few rows from all over the set are nearly dependent,
// which those of a flat spectrum are not. The test costs a hundredth of what a vain try does, and decides nothing
// else.
bool is_worth_narrow(const RowSet& set) {
  constexpr int64_t kRows = 96;
  constexpr float kLeast = 5e-4f;  // smallest eigenvalue, in units of the mean one
  const int64_t ld = padded(set.x->dim);
  int64_t index[kRows];
  for (int64_t i = 0; i < kRows; ++i) index[i] = set.index(i * set.n / kRows);
  Buffer<float> rows(kRows * ld), gram(kRows * kRows);
  gather_rows({set.x, index, 0, kRows, set.center}, rows.data(), ld);
  row_dots(rows.data(), kRows, rows.data(), kRows, ld, gram.data(), kRows);
  float trace = 0.0f;
  for (int64_t i = 0; i < kRows; ++i) trace += gram[i * kRows + i];
  // Centred rows are dependent.
  const int64_t side = set.center ? kRows - 1 : kRows;
  for (int64_t i = 0; i < side; ++i) gram[i * kRows + i] -= kLeast * trace / static_cast<float>(kRows);
  return is_positive_definite(gram.data(), side, kRows);
}

}  // namespace

void StreamedRank::measure(const RowSet& set, bool exact) {
  DSE_STAGE("rank: second moment");
  set_ = set;
  m_ = std::min(set.n, set.x->dim);
  const bool columns = set.n > set.x->dim;
  // Unit rows only: their squares cannot leave float32's range. Small matrices cost nothing either way, and of
  // hardly more rows than features the smallest eigenvalue is seldom large enough.
  const bool narrow = !exact && columns && 4 * set.n >= 5 * m_ && set.x->unit_rows &&
                      set.x->dtype != DType::kFloat64 && m_ > kLanesMaxSide && is_worth_narrow(set);
  const bool is_short = uses_short_products() && !set.center;
  fill_gram(!narrow ? Products::kWide : is_short ? Products::kShort : Products::kNarrow);
  // Dead features are float64's.
  if (null_ > 0 && products_ != Products::kWide) fill_gram(Products::kWide);
}

void StreamedRank::fill_gram(Products products) {
  const int64_t ldg = stream_ld(m_);
  double* gram = gram_.reserve(m_ * ldg);
  const bool columns = set_.n > set_.x->dim;
  double magnitude = 0.0;
  products_ = products;
  row_error_ = 0.0;
  if (products == Products::kShort) magnitude = short_column_gram(set_, gram, &row_error_);
  else if (products == Products::kNarrow) magnitude = column_gram<float>(set_, gram);
  else magnitude = columns ? column_gram<double>(set_, gram) : row_gram(set_, gram);
  floor_ = noise_floor(magnitude, set_.n);
  null_ = count_null(gram, m_, ldg, set_.center && !columns);
  if (m_ <= kLanesMaxSide) mirror(gram, ldg, 0, m_, m_);
  double trace = 0.0;
  for (int64_t i = 0; i < m_; ++i) trace += gram[i * ldg + i];
  gram_error_ = 0.0;
  if (products == Products::kNarrow) gram_error_ = narrow_products(set_.n, m_) * trace;
  // Roundings E of rows add E^T E, whose diagonal is taken off as far as it is known; the rest is
  // narrow_loss()'s.
  if (products == Products::kShort) gram_error_ = row_error_ * row_error_ * static_cast<double>(set_.n);
  finite_ = std::isfinite(trace);
}

void StreamedRank::reduce(bool exact) {
  DSE_STAGE("rank: tridiagonal form, eigenvalues");
  if (!finite_) return;
  const int64_t ldg = stream_ld(m_);
  double* gram = gram_.data();
  double* values = spectrum_.reserve(3 * m_);
  if (m_ <= kLanesMaxSide) {
    const double* matrix = gram;
    converged_ = small_.reduce(1, &matrix, &m_, &ldg, &values);
    return;
  }
  const bool mixed = !exact && null_ == 0;
  if (mixed) large_.reduce_mixed(gram, m_, ldg, m_ / kWideShare, flat_share(m_, std::max(set_.n, set_.x->dim)));
  else large_.reduce(gram, m_, ldg);
}

void StreamedRank::find_eigenvalues() {
  DSE_STAGE("rank: tridiagonal form, eigenvalues");
  accurate_ = true;
  traced_.reset();
  if (!finite_ || m_ <= kLanesMaxSide) return;
  const double error = gram_error_ + large_.error();
  if (error > 0.0) {
    if (null_ == 0) traced_ = rank_by_traces(large_, error, row_error_, floor_, iterated_);
    accurate_ = traced_ && traced_->loss.is_small() && traced_->loss.rows < kShortLoss;
    return;
  }
  double* values = spectrum_.data();
  const double* diagonal = large_.diagonal();
  const double* couplings = large_.couplings();
  converged_ = tridiagonal_eigenvalues(1, &diagonal, &couplings, &m_, &values, iterated_);
  for (int64_t i = 0; i < m_; ++i) values[i] /= large_.scale();
}

void StreamedRank::start_again() {
  if (products_ == Products::kShort && traced_) {
    fill_gram(Products::kNarrow);
    reduce(false);
  } else if (products_ != Products::kWide) {  // also where the smallest eigenvalue is out of reach of all others
    fill_gram(Products::kWide);
    reduce(true);
  } else {
    DSE_STAGE("rank: tridiagonal form, eigenvalues");
    large_.reduce_again(gram_.data());
  }
  find_eigenvalues();
}

double StreamedRank::finish(bool exact, double* gradient, RankForm* form) {
  while (!accurate_) start_again();
  DSE_STAGE("rank: gradient matrix");
  const int64_t ldg = stream_ld(m_);
  *form = {};
  bool steep = false;
  if (!finite_) {  // squares overflow: no number can be given
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (gradient != nullptr) std::fill_n(gradient, m_ * m_, nan);
    return nan;
  }
  if (traced_) {
    if (gradient != nullptr) apply_narrow(traced_->function, traced_->loss, gradient, form);
    return traced_->value;
  }
  double* values = spectrum_.data();
  double* sigma = values + m_;
  double* weight = sigma + m_;
  double* gram = gram_.data();
  double result = 0.0;
  if (converged_) {
    eigenvalues_to_sigma(values, m_, null_, floor_, sigma);
    result = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m_, weight);
    if (sigma[m_ - 1] == 0.0) {
      if (gradient != nullptr) std::fill_n(gradient, m_ * m_, 0.0);
      return result;
    }
    steep = (gradient != nullptr || exact) &&
            (is_steep(values, m_, null_, floor_, exact ? steep_ratio<double>() : steep_ratio<float>()) ||
             sigma[null_] == 0.0);
  }
  if (steep || !converged_) {
    if (const auto value = finish_in_two_parts(exact, gradient, form)) return *value;
    form->steep = true;
    const double value = finish_exactly(gradient);
    return exact || !converged_ ? value : result;
  }
  if (gradient == nullptr) return result;
  Part part = Part::of(values + null_, m_ - null_);
  if (!gradient_functions(SpectralKind::kEffectiveRank, &part, 1, result, SingularSums::of(sigma, weight, m_),
                          exact ? function_error<double>() : function_error<float>())) {
    std::fill_n(gradient, m_ * m_, 0.0);
    return result;
  }
  if (m_ <= kLanesMaxSide) {
    const ShiftedInverses* functions = &part.function;
    small_.apply(&functions, &gram, &ldg);
  } else {
    if (!exact) {
      const NarrowLoss loss = narrow_loss(values, sigma, weight, null_, 0, m_, result, part.function, 0.0);
      if (loss.is_small()) {
        apply_narrow(part.function, loss, gradient, form);
        return result;
      }
    }
    large_.apply(part.function, gram);
  }
  if (set_.center && set_.n <= set_.x->dim) centre_both_ways(gram, m_, ldg);
  store_matrix(gram, m_, m_, ldg, gradient);
  return result;
}

void StreamedRank::apply_narrow(const ShiftedInverses& function, const NarrowLoss& loss, double* gradient,
                                RankForm* form) {
  const int64_t ldg = stream_ld(m_);
  double unit = 1.0;
  float* matrix = large_.apply_narrow(function, &unit);
  if (set_.center && set_.n <= set_.x->dim) centre_both_ways(matrix, m_, ldg);
  for_each_task(m_, 16 * m_ * m_,
                [&](int64_t i, int64_t) { store_matrix(matrix + i * ldg, 1, m_, ldg, gradient + i * m_, unit); });
  form->short_products =
      uses_short_products() && set_.x->unit_rows && kShortRounding * loss.amplification < kShortLoss;
}

// Where only a few eigenvalues are out of the Gram matrix's reach and well below the others, as behind a layer
// normalization, whose features sum to zero but for rounding: their eigenvectors V are within reach all the same,
// and so is the small matrix of X V, whose squares are not lost beside larger ones.
std::optional<double> StreamedRank::finish_in_two_parts(bool exact, double* gradient, RankForm* form) {
  constexpr int64_t kMost = 32;  // eigenvalues of the small part
  constexpr double kGap = 1e3;
  const int64_t m = m_, d = set_.x->dim, ldg = stream_ld(m);
  if (!converged_ || null_ > 0 || m <= kLanesMaxSide || set_.n <= d || set_.center) return std::nullopt;
  double* values = spectrum_.data();
  double* sigma = values + m;
  double* weight = sigma + m;
  const double ratio = exact ? steep_ratio<double>() : steep_ratio<float>(), largest = values[m - 1];
  const int64_t few = std::lower_bound(values, values + m, ratio * largest) - values;
  if (few == 0 || few > kMost || values[few] < kGap * std::max(std::abs(values[0]), values[few - 1]))
    return std::nullopt;

  Tridiagonal& matrix = large_;
  double* basis = factors_.reserve(few * m + 2 * few * m);
  matrix.smallest_subspace(few, std::max(std::abs(values[0]), values[few - 1]), basis);
  const int64_t ld = gram_ld(few);
  Buffer<double> part(few * ld);
  projected_gram(set_, basis, few, part.data(), ld);
  double part_values[kMost];
  const double* part_matrix = part.data();
  double* part_target = part_values;
  if (!small_.reduce(1, &part_matrix, &few, &ld, &part_target)) return std::nullopt;

  eigenvalues_to_sigma(values, m, few, floor_, sigma);
  for (int64_t i = 0; i < few; ++i) sigma[i] = std::sqrt(std::max(part_values[i], 0.0));
  cut_noise(sigma, m, set_.n, d, floor_);
  const bool vanishes = sigma[few - 1] == 0.0;
  // What is left of the small part is to be accurate, or nothing is to be left.
  if (!vanishes && (exact || sigma[0] == 0.0 || part_values[0] < ratio * part_values[few - 1]))
    return std::nullopt;
  const double value = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m, weight);
  if (!vanishes) *form = {true, few};
  if (gradient == nullptr) return value;

  Part parts[2]{Part::of(values + few, m - few), Part::of(part_values, few)};
  if (!gradient_functions(SpectralKind::kEffectiveRank, parts, vanishes ? 1 : 2, value,
                          SingularSums::of(sigma, weight, m),
                          exact ? function_error<double>() : function_error<float>())) {
    std::fill_n(gradient, m * m, 0.0);
    return value;
  }
  double* gram = gram_.data();
  matrix.apply(parts[0].function, gram);
  // (I - V V^T) F (I - V V^T) + V f V^T = F - V W^T - W V^T, W = F V - V (V^T F V + f) / 2.
  std::fill(part.data(), part.data() + few * ld, 0.0);
  if (!vanishes) {
    const ShiftedInverses* functions = &parts[1].function;
    double* target = part.data();
    small_.apply(&functions, &target, &ld);
  }
  double* turned = basis + few * m;
  double* update = turned + few * m;
  multiply_rows(gram, m, ldg, few, basis, turned);
  for (int64_t r = 0; r < few; ++r) {
    double* w = update + r * m;
    std::copy_n(turned + r * m, m, w);
    for (int64_t q = 0; q < few; ++q)
      axpy(-0.5 * (dot(turned + r * m, basis + q * m, m) + part[q * ld + r]), basis + q * m, w, m);
  }
  subtract_both_ways(gram, m, ldg, few, basis, update);
  store_matrix(gram, m, m, ldg, gradient);
  return value;
}

// By a singular value decomposition of the matrix or of its triangular factor.
double StreamedRank::finish_exactly(double* gradient) {
  const int64_t d = set_.x->dim, n = set_.n, ldg = stream_ld(m_);
  double* sigma = spectrum_.data() + m_;
  double* weight = sigma + m_;
  double* r = factors_.reserve(m_ * d + m_ * m_);
  double* basis = r + m_ * d;  // left singular vectors (n <= d) or right ones, as rows
  if (n <= d) {
    Buffer<double> matrix(n * d), u(m_ * m_);
    gather_rows(set_, matrix.data(), d);
    thin_svd(matrix.data(), n, d, d, u.data(), sigma, nullptr);
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t j = 0; j < m_; ++j) basis[j * m_ + i] = u[i * m_ + j];
  } else {
    streamed_triangle(set_, r);
    thin_svd(r, d, d, d, nullptr, sigma, basis);
  }
  std::fill(sigma + m_ - null_, sigma + m_, 0.0);
  cut_noise(sigma, m_, n, d, floor_);
  const double value = spectral_value_and_weights(SpectralKind::kEffectiveRank, sigma, m_, weight);
  if (gradient == nullptr) return value;
  for (int64_t i = 0; i < m_; ++i) weight[i] = sigma[i] > 0.0 ? weight[i] / sigma[i] : 0.0;
  weighted_projector(basis, weight, m_, scaled_, gram_.data(), ldg);
  store_matrix(gram_.data(), m_, m_, ldg, gradient);
  return value;
}

}  // namespace dse::cpu
