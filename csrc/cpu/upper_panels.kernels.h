// Included by kernels of one instruction set (every_isa.h), into their namespace.

namespace dse::cpu::DSE_ISA {
namespace {

// Calls tile(rows, i, j, last) for rows i0 .. i1 and columns j0 .. j1 of an upper triangle, in panels of kPanel
// columns of which `last` are used and tiles of R rows (`rows` is a constant), then of single ones; those wholly
// below the diagonal of a panel are left out.
template <int64_t kPanel, int R, typename Tile>
DSE_INLINE void for_each_upper_tile_of_panels(int64_t i0, int64_t i1, int64_t j0, int64_t j1, const Tile& tile) {
  for (int64_t j = j0; j < j1; j += kPanel) {
    const int64_t last = std::min(kPanel, j1 - j);
    int64_t i = i0;
    for (; i + R <= i1 && i < j + kPanel; i += R) tile(std::integral_constant<int, R>{}, i, j, last);
    for (; i < i1 && i < j + kPanel; ++i) tile(std::integral_constant<int, 1>{}, i, j, last);
  }
}

}  // namespace
}  // namespace dse::cpu::DSE_ISA
