/* tile_amx.h: c (m, n) = a (m, k) b (k, n), or += where `accumulate` is set, on AMX tiles: bf16 operands, float32 sums.
 *
 * Operands are cut into tiles of 1 KiB. A tile of a: 16 rows, 32 steps of k. A tile of b: 16 pairs of steps, 16 columns, the
 * two steps of a pair side by side. An operand has one plane, its values as bf16, or two, high and low, with high + low the
 * value to 2^-16; then every plane of a meets every plane of b: what low low adds is small, but on the diagonal of a^T a it has
 * one sign. All tiles beyond an edge are filled with zeros.
 *
 *   packed a  [block of k][32 rows][plane][32 steps][2 tiles]    by pack_a, once a call, in scratch memory
 *   block     [32 columns][plane][32 steps][2 tiles]             by pack_b, a block of k at a time, in the second-level cache
 *   sums      [32 rows][32 columns][2 x 2 tiles]                 between blocks of k, in the second-level cache
 *
 * A task owns `chunk` rows and `width` columns of c. For each block of k it packs b, then each 32 rows of a, which fit the
 * first-level cache, meet all columns, 2 x 2 tiles at a time: four tile products for four tile loads. Tile products add in
 * the order of k (and of the planes in a block of k), and sums are kept as they are between blocks, so an element's value does not
 * depend on m, on the task or on the number of threads. */
#ifndef QL_TILE_AMX_H
#define QL_TILE_AMX_H

#include "../quantlab.h"
#include "bf16_amx.h"

#include <stdatomic.h>
#include <string.h> /* memset */

enum {
    BLOCK_STEPS = 512,        /* steps of k in a block, all planes together: 32 rows of a are 32 KiB, two thirds of the cache */
