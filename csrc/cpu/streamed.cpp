#include "cpu/streamed.h"

#include <cmath>
#include <vector>

#include "cpu/aten.h"
#include "cpu/dense.h"
#include "cpu/parallel.h"
#include "cpu/short_products.h"
#include "cpu/simd.h"

namespace dse::cpu {
namespace {

constexpr int64_t kStreamRows = 128;

// Calls put(block, rows, i, row) for every row of a block of `block_rows`, centred (in parallel), then
// consume(block, rows), block after block; `block` has block_rows * ld elements. Returns the root mean square
// norm that centred rows had before.
template <typename P, typename Put, typename Consume>
double stream_blocks(const RowSet& set, int64_t block_rows, int64_t ld, const Put& put, const Consume& consume) {
  const int64_t d = set.x->dim, n = set.n;
  Buffer<double> mean(d), norms(block_rows), row_work(max_workers() * d);
  Buffer<P> narrow_work(max_workers() * d);
  Buffer<P> block(block_rows * ld);
  if (set.center) column_means(set, mean.data());
  double squares = 0.0;
  for (int64_t begin = 0; begin < n; begin += block_rows) {
    const int64_t rows = std::min(block_rows, n - begin);
    constexpr int64_t kRowsPerTask = 16;
    for_each_task((rows + kRowsPerTask - 1) / kRowsPerTask, 32 * rows * d, [&](int64_t task, int64_t worker) {
      double* row = row_work.data() + worker * d;
      P* narrow = narrow_work.data() + worker * d;
      for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
        if (!set.center) {
          set.x->load(set.index(begin + i), narrow);
          put(block.data(), rows, i, narrow);
          continue;
        }
        set.x->load(set.index(begin + i), row);
        norms[i] = sum_of_squares(row, d);
        axpy(-1.0, mean.data(), row, d);
        put(block.data(), rows, i, row);
      }
    });
    if (set.center)
      for (int64_t i = 0; i < rows; ++i) squares += norms[i];
    consume(block.data(), rows);
  }
  return std::sqrt(squares / static_cast<double>(n));
}

}  // namespace

void column_means(const RowSet& set, double* mean) {
  const int64_t d = set.x->dim, n = set.n;
  const int64_t block_rows = reduction_rows(n), blocks = (n + block_rows - 1) / block_rows;
  Buffer<double> partial((2 * blocks + 1) * d);
  double* origin = partial.data() + 2 * blocks * d;
  set.x->load(set.index(0), origin);
  for_each_task(blocks, 8 * n * d, [&](int64_t b, int64_t) {
    double* sum = partial.data() + 2 * b * d;
    double* row = sum + d;
    std::fill(sum, sum + d, 0.0);
    for (int64_t i = b * block_rows; i < std::min(n, (b + 1) * block_rows); ++i) {
      set.x->load(set.index(i), row);
      for (int64_t f = 0; f < d; ++f) sum[f] += row[f] - origin[f];
    }
  });
  for (int64_t b = 1; b < blocks; ++b) axpy(1.0, partial.data() + 2 * b * d, partial.data(), d);
  for (int64_t f = 0; f < d; ++f) mean[f] = origin[f] + partial[f] / static_cast<double>(n);
}

void streamed_triangle(const RowSet& set, double* r) {
  const int64_t d = set.x->dim, ld = d, block_rows = std::max<int64_t>(d, kStreamRows);
  Buffer<double> stack((d + block_rows) * ld);
  int64_t height = 0;
  const auto put = [&](double* block, int64_t, int64_t i, const double* row) {
    std::copy_n(row, d, block + i * ld);
  };
  stream_blocks<double>(set, block_rows, ld, put, [&](const double* block, int64_t rows) {
    std::copy_n(block, rows * ld, stack.data() + height * ld);
    const int64_t total = height + rows;
    if (total < d) {
      height = total;
      return;
    }
    qr_triangle(stack.data(), total, d, ld, r);
    std::copy_n(r, d * d, stack.data());
    height = d;
  });
}

namespace {

// The root mean square norm of rows, from their Gram matrix.
double magnitude_of(const double* gram, int64_t d, int64_t n) {
  double trace = 0.0;
  for (int64_t f = 0; f < d; ++f) trace += gram[f * stream_ld(d) + f];
  return std::sqrt(trace / static_cast<double>(n));
}

}  // namespace

template <typename P>
double column_gram(const RowSet& set, double* gram) {
  constexpr int64_t kPanel = sizeof(P) == 8 ? kGramPanel : kNarrowPanel;
  // Rows between two additions to the sums: those of one panel of each operand fit the smallest cache.
  const int64_t part = summed_rows(set.n, set.x->dim), block_rows = 4 * kLeastSummedRows;
  const int64_t d = set.x->dim, ldg = stream_ld(d);
  std::fill(gram, gram + d * ldg, 0.0);
  const auto put = [&](P* block, int64_t all, int64_t index, const auto* row) {
    const int64_t before = index / part * part, rows = std::min(part, all - before), i = index - before;
    P* panels = block + before * ldg;
    for (int64_t f = 0; f < d; f += kPanel) {
      P* out = panels + f * rows + i * kPanel;
      const int64_t width = std::min(kPanel, d - f);
      for (int64_t j = 0; j < width; ++j) out[j] = static_cast<P>(row[f + j]);
      std::fill(out + width, out + kPanel, P(0));
    }
  };
  const double magnitude = stream_blocks<P>(set, block_rows, ldg, put, [&](const P* panels, int64_t rows) {
    for_each_upper_tile(0, d, kGramTile, d * d * rows / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
      for (int64_t r = 0; r < rows; r += part)
        panel_gram_upper(panels + r * ldg, std::min(part, rows - r), gram, ldg, i0, i1, j0, j1);
    });
  });
  return set.center ? magnitude : magnitude_of(gram, d, set.n);
}

template double column_gram<float>(const RowSet&, double*);
template double column_gram<double>(const RowSet&, double*);

double short_column_gram(const RowSet& set, double* gram, double* rounding) {
  static_assert(kShortPanel == kNarrowPanel);
  // Parts of about kShortRows rows; those of a block are added to a tile of the result while that is in the
  // cache.
  constexpr int64_t kParts = 2;
  const int64_t d = set.x->dim, n = set.n, ldg = stream_ld(d), panels = ldg / kShortPanel;
  const int64_t all = std::max<int64_t>(1, (n + kShortRows / 2) / kShortRows);
  const int64_t part_rows = (n + all - 1) / all, part_pairs = (part_rows + 1) / 2;
  // AMX turns columns for every tile, and is the faster for wide ones.
  const int64_t side = uses_tiles() && d >= 6 * kGramTile ? 2 * kGramTile : kGramTile;
  Buffer<ShortPair> block(std::min(kParts, all) * part_pairs * ldg + kShortSlack);
  Buffer<float> step(kParts * ldg), work(max_workers() * part_rows * kShortPanel);
  std::vector<double> added(static_cast<size_t>(d));  // to the squares of columns, by their rounding
  for (int64_t begin = 0; begin < n; begin += kParts * part_rows) {
    const int64_t rows = std::min(kParts * part_rows, n - begin), parts = (rows + part_rows - 1) / part_rows;
    const auto height = [&](int64_t part) { return std::min(part_rows, rows - part * part_rows); };
    const auto pairs = [&](int64_t part) { return (height(part) + 1) / 2; };
    const auto panels_of = [&](int64_t part) { return block.data() + part * part_pairs * ldg; };
    for_each_own_task(parts * panels, 16 * rows * d, [&](int64_t task, int64_t worker) {
      const int64_t part = task / panels, first = task % panels * kShortPanel;
      const int64_t width = std::min(kShortPanel, d - first);
      float* panel = work.data() + worker * part_rows * kShortPanel;
      for (int64_t i = 0; i < height(part); ++i) {
        float* row = panel + i * kShortPanel;
        set.x->load_part(set.index(begin + part * part_rows + i), first, width, row);
        std::fill(row + width, row + kShortPanel, 0.0f);
      }
      quantize_columns(panel, height(part), panels_of(part) + first * pairs(part),
                       step.data() + part * ldg + first);
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t f = 0; f < d; ++f) {
        const auto own = static_cast<double>(step[part * ldg + f]);
        added[static_cast<size_t>(f)] += own * own * static_cast<double>(height(part)) / 12.0;
      }
    }
    for_each_upper_tile(0, d, side, d * d * rows / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
      // Zeroed by whom it is of.
      if (begin == 0)
        for (int64_t i = i0; i < i1; ++i)
          std::fill(gram + i * ldg + j0, gram + i * ldg + (j1 == d ? ldg : j1), 0.0);
      for (int64_t part = 0; part < parts; ++part)
        short_gram_upper(panels_of(part), pairs(part), pairs(part), step.data() + part * ldg, gram, ldg, i0, i1,
                         j0, j1);
    });
  }
  double squares = 0.0;
  for (int64_t f = 0; f < d; ++f) {
    squares += added[static_cast<size_t>(f)];
    gram[f * (ldg + 1)] -= added[static_cast<size_t>(f)];
  }
  *rounding = std::sqrt(squares / static_cast<double>(n * d));
  return magnitude_of(gram, d, n);
}

double row_gram(const RowSet& set, double* gram) {
  const int64_t d = set.x->dim, n = set.n, ldg = stream_ld(n);
  std::fill(gram, gram + n * ldg, 0.0);
  Buffer<double> matrix(n * d), turned(d * ldg);
  const double magnitude = gather_rows(set, matrix.data(), d);
  transpose(matrix.data(), n, d, d, turned.data(), ldg);
  for_each_upper_tile(0, n, kGramTile, n * n * d / 2, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    tn_product_upper(turned.data(), ldg, turned.data(), ldg, d, gram, ldg, i0, i1, j0, j1);
  });
  return magnitude;
}

void projected_gram(const RowSet& set, const double* basis, int64_t count, double* gram, int64_t ld) {
  const int64_t d = set.x->dim, n = set.n, block = reduction_rows(n), blocks = (n + block - 1) / block;
  const int64_t cells = count * count;
  Buffer<double> partial(blocks * cells), work(max_workers() * (d + count));
  for_each_task(blocks, n * d * (count + 4), [&](int64_t b, int64_t worker) {
    double* row = work.data() + worker * (d + count);
    double* coordinates = row + d;
    double* own = partial.data() + b * cells;
    std::fill(own, own + cells, 0.0);
    for (int64_t i = b * block; i < std::min(n, (b + 1) * block); ++i) {
      set.x->load(set.index(i), row);
      for (int64_t r = 0; r < count; ++r) coordinates[r] = dot(basis + r * d, row, d);
      for (int64_t r = 0; r < count; ++r) axpy(coordinates[r], coordinates, own + r * count, count);
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    std::fill(gram + r * ld, gram + (r + 1) * ld, 0.0);
    for (int64_t b = 0; b < blocks; ++b) axpy(1.0, partial.data() + b * cells + r * count, gram + r * ld, count);
  }
}

}  // namespace dse::cpu
