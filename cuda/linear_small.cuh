/* linear_small.cuh: y = x W^T for 1 to 64 tokens, bound by reading W: the packed weight (units.cuh) is the A operand of
 * mma.m16n8k16, 8 tokens the B operand, the sums are float32. Codes become exact integers (or table values) in bf16; the scale of a
 * group multiplies the float32 sum of the group.
 *
 * A tile is 16 outputs: two units of 8 rows, which need not be neighbours: for rotary embeddings they are rows i and i + d/2 of a
 * head, for SwiGLU the same rows of gate and up, so that what the epilogue combines lies in one lane. Up to three weights stand
 * side by side in one launch (`part`).
 *
 * ring      One persistent block an SM or more. A producer warp copies stages (`tiles` tiles x warps * `units` units of each
 *           half) into a ring in shared memory by bulk copies; `warps` consumer warps each take a unit of K, so they split K;
 *           their partial sums go through shared memory to an epilogue warp, which adds them in order while the next tile runs.
 *           In a cluster each block takes a part of K, and a block adds the sums of its tiles from all blocks of the cluster.
 * register  A block a tile (or several, one after the other); each warp loads all its units of a tile at once into
 *           registers. For small matrices, and for devices without bulk copies.
 * Both load weights before they wait for the kernel ahead of them, and let the next kernel start as soon as they run. */
#ifndef QL_CUDA_LINEAR_SMALL_CUH
#define QL_CUDA_LINEAR_SMALL_CUH

#include "cuda.h"
#include "units.cuh"

/* what becomes of a sum v0 (upper unit's row) and v1 (lower unit's row) of a token */
enum small_output { SMALL_FLOAT, SMALL_FLOAT_ADD, SMALL_BF16, SMALL_ROPE, SMALL_SWIGLU } /* in the order of ql_output */;

struct small_part {
    const uint8_t *upper, *lower;       /* records of the units of tile 0 */
    const float *factor, *factor_lower; /* powers of two that the sums are multiplied by */
    const int32_t *rows;                /* SMALL_ROPE: row of `out` of each token, or NULL */
    void *out;                          /* (rows, n) */
    int tiles;
    int divisor, multiplier;            /* unit of tile t: t / divisor * multiplier + t % divisor, counted from upper and lower */
    int lower_rows;                     /* rows that the lower unit's rows stand below the upper's */
    int n, output, rotate;
};

struct small_args {
    small_part part[3];
    const uint8_t *x;           /* blocks of activations (units.cuh), (tokens8, k32) */
    const float *cos, *sin;     /* SMALL_ROPE: (positions, d / 2) */
    const int32_t *positions;   /* (m,) */
    const uint8_t *zeros_table; /* not used without tables: 16 bf16 values of the format's codes */
    int tiles;                  /* of all parts */
    int units;                  /* along k */
    int x_units;                /* blocks of activations along k: units * columns / 32 */
    int record, parts, zeros;   /* bytes of a record, scales a row and unit, whether there are zero points */
    int m, d, stages;
};

struct small_tile {
    const uint8_t *upper, *lower;
    int part, unit;
};

__device__ __forceinline__ small_tile locate_tile(const small_args &a, int t) {
    small_tile tile;
    tile.part = 0;
    while (tile.part < 2 && t >= a.part[tile.part].tiles) { t -= a.part[tile.part++].tiles; }
    const small_part &p = a.part[tile.part];
    tile.unit = t / p.divisor * p.multiplier + t % p.divisor;
    int64_t offset = (int64_t)tile.unit * a.units * a.record;
    tile.upper = p.upper + offset, tile.lower = p.lower + offset;
    return tile;
}

/* ---- one unit pair: 16 rows x columns ------------------------------------------------------------------------- */

/* sums += unit pair * x. Parts: scales a row and unit (0: known only at run time); x_at(j, nt) gives 16 bytes of activations of
 * steps j and j + 1; scale_at(part, half) the scale, offset_at(part, half) the zero point */
template <typename Codes, int Tokens8, int Parts, typename X, typename Scale, typename Offset>
__device__ __forceinline__ void unit_pair(float (&sums)[Tokens8][4], const uint32_t (&wu)[Codes::words], const uint32_t (&wl)[Codes::words],
                                          int parts, uint32_t table, X x_at, Scale scale_at, Offset offset_at) {
    constexpr int steps = Codes::columns / STEP;
    int steps_a_part = Parts > 0 ? steps / Parts : steps / (parts > 0 ? parts : 1);
    float part_sums[Tokens8][4];
    uint32_t offset_u = Codes::symmetric, offset_l = Codes::symmetric;
    int part = 0;
#pragma unroll
    for (int j = 0; j < steps; j += 2) {
        uint4 x[Tokens8];
#pragma unroll
        for (int nt = 0; nt < Tokens8; nt++) { x[nt] = x_at(j / 2, nt); }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (Codes::scaled && (j + i) % steps_a_part == 0) {
                offset_u = offset_at(part, 0), offset_l = offset_at(part, 1);
#pragma unroll
                for (int nt = 0; nt < Tokens8; nt++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) { part_sums[nt][e] = 0.0f; }
                }
            }
            uint32_t a[4] = {Codes::pair(wu, j + i, 0, offset_u, table), Codes::pair(wl, j + i, 0, offset_l, table),
                             Codes::pair(wu, j + i, 1, offset_u, table), Codes::pair(wl, j + i, 1, offset_l, table)};
#pragma unroll
            for (int nt = 0; nt < Tokens8; nt++) {
                mma_bf16(Codes::scaled ? part_sums[nt] : sums[nt], a, i == 0 ? x[nt].x : x[nt].z, i == 0 ? x[nt].y : x[nt].w);
            }
            if (Codes::scaled && (j + i + 1) % steps_a_part == 0) {
                float su = scale_at(part, 0), sl = scale_at(part, 1);
#pragma unroll
                for (int nt = 0; nt < Tokens8; nt++) {
                    sums[nt][0] += su * part_sums[nt][0], sums[nt][1] += su * part_sums[nt][1];
                    sums[nt][2] += sl * part_sums[nt][2], sums[nt][3] += sl * part_sums[nt][3];
                }
                part++;
            }
        }
    }
}

/* ---- epilogue -------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void small_store(const small_args &a, const small_tile &tile, int g, int token, float v0, float v1) {
    const small_part &p = a.part[tile.part];
    if (token >= a.m) { return; }
    int row = tile.unit * UNIT_ROWS + g, row_lower = row + p.lower_rows;
    v0 *= *p.factor, v1 *= *p.factor_lower;
    int64_t line = (int64_t)(p.rows != NULL ? p.rows[token] : token) * p.n;
    if (p.output == SMALL_FLOAT || p.output == SMALL_FLOAT_ADD) {
        float *out = (float *)p.out + line;
        bool add = p.output == SMALL_FLOAT_ADD;
        if (row < p.n) { out[row] = add ? out[row] + v0 : v0; }
        if (row_lower < p.n) { out[row_lower] = add ? out[row_lower] + v1 : v1; }
        return;
    }
    bf16 *out = (bf16 *)p.out + line;
    if (p.output == SMALL_SWIGLU) {
        if (row < p.n) { out[row] = __float2bfloat16_rn(silu(v0) * v1); }
        return;
    }
    if (p.output == SMALL_ROPE && p.rotate) {
        int half = a.d / 2, i = row % a.d;
        int64_t at = (int64_t)a.positions[token] * half + i;
        float2 turned = rope_pair(v0, v1, a.cos[at], a.sin[at]);
        v0 = turned.x, v1 = turned.y;
    }
    if (row < p.n) { out[row] = __float2bfloat16_rn(v0); }
    if (row_lower < p.n) { out[row_lower] = __float2bfloat16_rn(v1); }
}

/* c: a C fragment of tokens 8 nt.. */
__device__ __forceinline__ void small_store_fragment(const small_args &a, const small_tile &tile, int lane, int nt, float4 c) {
    int token = 8 * nt + 2 * (lane % 4);
    small_store(a, tile, lane / 4, token, c.x, c.z);
    small_store(a, tile, lane / 4, token + 1, c.y, c.w);
}

/* a table for byte -> pair of bf16, a copy a lane; values: 16 bf16 */
__device__ __forceinline__ void fill_table(uint32_t *table, const uint8_t *values) {
    const uint16_t *value = (const uint16_t *)values;
    for (int i = threadIdx.x; i < 256 * WARP; i += blockDim.x) {
        int byte = i / WARP;
        table[i] = (uint32_t)value[byte & 15] | (uint32_t)value[byte >> 4] << 16;
    }
}

/* ---- register kernel ------------------------------------------------------------------------------------------- */

/* units: of K, a warp; warp w of W takes units w, w + W, ... */
template <typename Codes, int Parts> struct small_unit {
    uint32_t upper[Codes::words], lower[Codes::words];
    uint32_t scale[Parts > 0 ? Parts : 1], offset[Parts > 0 ? Parts : 1]; /* upper in the low half, lower in the high half */
};

template <typename Codes, int Parts>
__device__ __forceinline__ void load_unit(small_unit<Codes, Parts> &u, const small_args &a, const small_tile &tile, int unit, int lane) {
    if (unit >= a.units) {
#pragma unroll
        for (int i = 0; i < Codes::words; i++) { u.upper[i] = u.lower[i] = 0; }
#pragma unroll
        for (int i = 0; i < Parts; i++) { u.scale[i] = 0, u.offset[i] = 0; }
        return;
    }
    const uint8_t *upper = tile.upper + (int64_t)unit * a.record, *lower = tile.lower + (int64_t)unit * a.record;
    load_words<Codes>(u.upper, upper, lane);
    load_words<Codes>(u.lower, lower, lane);
    if constexpr (Codes::scaled) {
        int place = Codes::bytes + lane / 4 * 2;
#pragma unroll
        for (int i = 0; i < Parts; i++) {
            u.scale[i] = __ldg((const uint16_t *)(upper + place + 16 * i)) | (uint32_t)__ldg((const uint16_t *)(lower + place + 16 * i)) << 16;
            u.offset[i] = 0;
            if (a.zeros) {
                int zero = place + 16 * (Parts + i);
                u.offset[i] = __ldg((const uint16_t *)(upper + zero)) | (uint32_t)__ldg((const uint16_t *)(lower + zero)) << 16;
            }
        }
    }
}

/* Single: one token, activations of one row. Units: of K a warp holds of a tile. The block has ceil(units / Units) warps. */
template <typename Codes, int Tokens8, bool Single, int Parts, int Units>
__device__ __forceinline__ void small_register_body(const small_args &a) {
    extern __shared__ __align__(128) uint8_t shared[];
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    uint32_t base = shared_address(shared), table = base + lane * 4;
    uint32_t partial = base + (Codes::table ? TABLE_BYTES : 0);
    small_tile tile = locate_tile(a, blockIdx.x);
    small_unit<Codes, Parts> u[Units];
#pragma unroll
    for (int i = 0; i < Units; i++) { load_unit<Codes, Parts>(u[i], a, tile, warp + i * warps, lane); }
    if (Codes::table) {
        fill_table((uint32_t *)shared, a.zeros_table);
        __syncthreads();
    }
    ql_cuda_start_next();
    ql_cuda_wait_previous();
    constexpr int rows = Single ? 1 : 8;
    const uint8_t *x = a.x + (Single ? 0 : g) * 64 + t * 16;
    int parity = 0;
    for (int index = blockIdx.x; index < a.tiles; index += gridDim.x) {
        float sums[Tokens8][4] = {};
        small_tile next = index + (int)gridDim.x < a.tiles ? locate_tile(a, index + gridDim.x) : tile;
#pragma unroll
        for (int i = 0; i < Units; i++) {
            int unit = warp + i * warps, known = unit < a.units ? unit : 0;
            auto x_at = [&](int block, int nt) {
                int64_t at = (int64_t)nt * a.x_units + known * (Codes::columns / 32) + block;
                return *(const uint4 *)(x + at * (rows * 64));
            };
            auto scale_at = [&](int part, int half) { return half_bits_to_float(half ? u[i].scale[part] >> 16 : u[i].scale[part] & 0xffffu); };
            auto offset_at = [&](int part, int half) {
                return a.zeros ? __byte_perm(u[i].offset[part], 0, half ? 0x3232 : 0x1010) : Codes::symmetric;
            };
            unit_pair<Codes, Tokens8, Parts>(sums, u[i].upper, u[i].lower, Parts, table, x_at, scale_at, offset_at);
            if (index + (int)gridDim.x < a.tiles) { load_unit<Codes, Parts>(u[i], a, next, unit, lane); }
        }
        uint32_t buffer = partial + parity * warps * Tokens8 * CHUNK;
#pragma unroll
        for (int nt = 0; nt < Tokens8; nt++) {
            store_shared_float4(buffer + (nt * warps + warp) * CHUNK + lane * 16, make_float4(sums[nt][0], sums[nt][1], sums[nt][2], sums[nt][3]));
        }
        __syncthreads();
        for (int nt = warp; nt < Tokens8; nt += warps) {
            float4 c = load_shared_float4(buffer + nt * warps * CHUNK + lane * 16);
            for (int w = 1; w < warps; w++) {
                float4 more = load_shared_float4(buffer + (nt * warps + w) * CHUNK + lane * 16);
                c.x += more.x, c.y += more.y, c.z += more.z, c.w += more.w;
            }
            small_store_fragment(a, tile, lane, nt, c);
        }
        tile = next, parity ^= 1;
    }
}

/* ---- ring kernel ------------------------------------------------------------------------------------------------ */

/* where things are in shared memory: barriers, table, activations, partial sums of warps, sums of other blocks, stages */
struct small_layout {
    uint32_t full, empty, x_full, sums_full, sums_empty, tile_full; /* barriers, 8 bytes each */
    uint32_t table, x, sums, tile_sums, stages, bytes;
};
enum { SMALL_MAX_STAGES = 16, SMALL_MAX_OWNED = 64 };

/* owned: tile groups that one block of a cluster adds up, 0 without clusters */
template <typename Codes, int Tokens8, bool Single, int Warps, int Units, int Tiles>
__host__ __device__ inline small_layout small_ring_layout(int stages, int record, int x_units, int cluster, int owned) {
    small_layout l;
    l.full = 0, l.empty = l.full + 8 * SMALL_MAX_STAGES, l.x_full = l.empty + 8 * SMALL_MAX_STAGES;
    l.sums_full = l.x_full + 8, l.sums_empty = l.sums_full + 16, l.tile_full = l.sums_empty + 16;
    l.table = (l.tile_full + 8 * SMALL_MAX_OWNED + 127) / 128 * 128;
    l.x = l.table + (Codes::table ? (uint32_t)TABLE_BYTES : 0u);
    l.sums = l.x + (uint32_t)(Tokens8 * x_units * (Single ? 64 : 512));
    l.sums = (l.sums + 127) / 128 * 128;
    l.tile_sums = l.sums + 2 * Warps * Tiles * Tokens8 * CHUNK;
    l.stages = l.tile_sums + (uint32_t)(owned * cluster * Tiles * Tokens8 * CHUNK);
    l.bytes = l.stages + (uint32_t)(stages * Tiles * 2 * Warps * Units * record);
    return l;
}

#ifdef QL_HAS_BULK_COPY

/* the units of K of one block of a cluster */
struct small_range {
    int first, end;
};
__host__ __device__ inline small_range small_units_of(int units, int rank, int cluster) {
    small_range r = {units * rank / cluster, units * (rank + 1) / cluster};
    return r;
}

template <int Warps, int Units, int Tiles>
__device__ __forceinline__ void small_produce(const small_args &a, uint32_t base, const small_layout &l, small_range k, int first, int step) {
    uint64_t policy = policy_evict_first();
    int stage = 0, phase = 0;
    uint32_t half_bytes = Warps * Units * a.record;
    for (int group = first; group * Tiles < a.tiles; group += step) {
        small_tile tile[Tiles];
#pragma unroll
        for (int r = 0; r < Tiles; r++) { tile[r] = locate_tile(a, min(group * Tiles + r, a.tiles - 1)); }
        for (int u = k.first; u < k.end; u += Warps * Units) {
            barrier_wait(base + l.empty + 8 * stage, phase ^ 1);
            uint32_t bytes = min(Warps * Units, k.end - u) * a.record, full = base + l.full + 8 * stage;
            barrier_arrive_expect(full, 2 * Tiles * bytes);
            uint32_t to = base + l.stages + stage * 2 * Tiles * half_bytes;
#pragma unroll
            for (int r = 0; r < Tiles; r++) {
                copy_bulk_hint(to + 2 * r * half_bytes, tile[r].upper + (int64_t)u * a.record, bytes, full, policy);
                copy_bulk_hint(to + (2 * r + 1) * half_bytes, tile[r].lower + (int64_t)u * a.record, bytes, full, policy);
            }
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
    }
}

template <typename Codes, int Tokens8, bool Single, int Parts, int Warps, int Units, int Tiles>
__device__ __forceinline__ void small_consume(const small_args &a, uint32_t base, const small_layout &l, small_range k, int first, int step,
                                              int warp, int lane) {
    constexpr int rows = Single ? 1 : 8;
    uint32_t half_bytes = Warps * Units * a.record, table = base + l.table + lane * 4;
    int x_units = (k.end - k.first) * (Codes::columns / 32);
    uint32_t x = base + l.x + (Single ? 0 : lane / 4) * 64 + lane % 4 * 16;
    int stage = 0, phase = 0, count = 0;
    barrier_wait(base + l.x_full, 0);
    for (int group = first; group * Tiles < a.tiles; group += step, count++) {
        float sums[Tiles][Tokens8][4] = {};
        for (int u = k.first; u < k.end; u += Warps * Units) {
            barrier_wait(base + l.full + 8 * stage, phase);
#pragma unroll
            for (int i = 0; i < Units; i++) {
                int unit = i * Warps + warp;
                if (u + unit >= k.end) { break; }
                uint32_t x_here = x + (u - k.first + unit) * (Codes::columns / 32) * (rows * 64);
                auto x_at = [&](int block, int nt) { return load_shared_16(x_here + (nt * x_units + block) * (rows * 64)); };
#pragma unroll
                for (int r = 0; r < Tiles; r++) {
                    uint32_t upper = base + l.stages + (stage * 2 * Tiles + 2 * r) * half_bytes + unit * a.record, lower = upper + half_bytes;
                    uint32_t wu[Codes::words], wl[Codes::words];
                    load_words<Codes>(wu, upper, lane);
                    load_words<Codes>(wl, lower, lane);
                    uint32_t place = Codes::bytes + lane / 4 * 2;
                    auto scale_at = [&](int part, int half) { return half_bits_to_float(load_shared_2((half ? lower : upper) + place + 16 * part)); };
                    auto offset_at = [&](int part, int half) {
                        if (!a.zeros) { return Codes::symmetric; }
                        uint32_t zero = load_shared_2((half ? lower : upper) + place + 16 * (a.parts + part));
                        return zero | zero << 16;
                    };
                    unit_pair<Codes, Tokens8, Parts>(sums[r], wu, wl, a.parts, table, x_at, scale_at, offset_at);
                }
            }
            __syncwarp();
            if (lane == 0) { barrier_arrive(base + l.empty + 8 * stage); }
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
        int buffer = count & 1;
        barrier_wait(base + l.sums_empty + 8 * buffer, (count >> 1 & 1) ^ 1);
        uint32_t to = base + l.sums + buffer * Warps * Tiles * Tokens8 * CHUNK + lane * 16;
#pragma unroll
        for (int r = 0; r < Tiles; r++) {
#pragma unroll
            for (int nt = 0; nt < Tokens8; nt++) {
                store_shared_float4(to + ((r * Tokens8 + nt) * Warps + warp) * CHUNK,
                                    make_float4(sums[r][nt][0], sums[r][nt][1], sums[r][nt][2], sums[r][nt][3]));
            }
        }
        __syncwarp();
        if (lane == 0) { barrier_arrive(base + l.sums_full + 8 * buffer); }
    }
}

/* adds `count` fragments that stand `stride` bytes apart, in order */
__device__ __forceinline__ float4 add_fragments(uint32_t from, int count, uint32_t stride) {
    float4 c = load_shared_float4(from);
#pragma unroll 4
    for (int i = 1; i < count; i++) {
        float4 more = load_shared_float4(from + i * stride);
        c.x += more.x, c.y += more.y, c.z += more.z, c.w += more.w;
    }
    return c;
}

template <int Tokens8, int Warps, int Tiles>
__device__ __forceinline__ void small_finish(const small_args &a, uint32_t base, const small_layout &l, int first, int step, int lane, int rank,
                                             int cluster) {
    constexpr int fragments = Tiles * Tokens8;
    int count = 0;
    for (int group = first; group * Tiles < a.tiles; group += step, count++) {
        int buffer = count & 1, owner = count % cluster, slot = count / cluster;
        barrier_wait(base + l.sums_full + 8 * buffer, count >> 1 & 1);
        uint32_t from = base + l.sums + buffer * Warps * fragments * CHUNK + lane * 16;
        uint32_t to = base + l.tile_sums + (slot * cluster + rank) * fragments * CHUNK + lane * 16;
#pragma unroll 1
        for (int r = 0; r < Tiles; r++) {
            small_tile tile = locate_tile(a, min(group * Tiles + r, a.tiles - 1));
#pragma unroll 1
            for (int nt = 0; nt < Tokens8; nt++) {
                float4 c = add_fragments(from + (r * Tokens8 + nt) * Warps * CHUNK, Warps, CHUNK);
                if (cluster > 1) {
                    cluster_store(cluster_address(to + (r * Tokens8 + nt) * CHUNK, owner), c);
                } else if (group * Tiles + r < a.tiles) {
                    small_store_fragment(a, tile, lane, nt, c);
                }
            }
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(base + l.sums_empty + 8 * buffer);
            if (cluster > 1) { cluster_arrive(cluster_address(base + l.tile_full + 8 * slot, owner)); }
        }
    }
    if (cluster == 1) { return; }
    for (int i = rank; i < count; i += cluster) {
        int slot = i / cluster, group = first + i * step;
        barrier_wait_cluster(base + l.tile_full + 8 * slot, 0);
        for (int r = 0; r < Tiles && group * Tiles + r < a.tiles; r++) {
            small_tile tile = locate_tile(a, group * Tiles + r);
            for (int nt = 0; nt < Tokens8; nt++) {
                uint32_t from = base + l.tile_sums + (slot * cluster * fragments + r * Tokens8 + nt) * CHUNK + lane * 16;
                small_store_fragment(a, tile, lane, nt, add_fragments(from, cluster, fragments * CHUNK));
            }
        }
    }
}

/* The block has Warps + 2 warps: consumers, then the producer, then the epilogue. */
template <typename Codes, int Tokens8, bool Single, int Parts, int Warps, int Units, int Tiles>
__device__ __forceinline__ void small_ring_body(const small_args &a) {
    extern __shared__ __align__(128) uint8_t shared[];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int cluster = cluster_size(), rank = cluster_rank(), first = blockIdx.x / cluster, step = gridDim.x / cluster;
    small_range k = small_units_of(a.units, rank, cluster);
    int most_units = (a.units + cluster - 1) / cluster, groups = (a.tiles + Tiles - 1) / Tiles;
    int owned = cluster > 1 ? ((groups + step - 1) / step + cluster - 1) / cluster : 0;
    small_layout l = small_ring_layout<Codes, Tokens8, Single, Warps, Units, Tiles>(a.stages, a.record, most_units * (Codes::columns / 32),
                                                                                     cluster, owned);
    uint32_t base = shared_address(shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) {
            barrier_init(base + l.full + 8 * i, 1);
            barrier_init(base + l.empty + 8 * i, Warps);
        }
        barrier_init(base + l.x_full, 1);
        for (int i = 0; i < 2; i++) {
            barrier_init(base + l.sums_full + 8 * i, Warps);
            barrier_init(base + l.sums_empty + 8 * i, 1);
        }
        for (int i = 0; i < owned; i++) { barrier_init(base + l.tile_full + 8 * i, cluster); }
        barrier_init_fence();
    }
    if (Codes::table) { fill_table((uint32_t *)(shared + l.table), a.zeros_table); }
    if (cluster > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    ql_cuda_start_next();
    if (warp == Warps) {
        if (lane == 0) { small_produce<Warps, Units, Tiles>(a, base, l, k, first, step); }
        __syncwarp();
        ql_cuda_wait_previous();
    } else if (warp == Warps + 1) {
        ql_cuda_wait_previous();
        if (lane == 0) { /* activations of this block's part of K */
            uint32_t bytes = (k.end - k.first) * (Codes::columns / 32) * (Single ? 64 : 512);
            int64_t place = (int64_t)k.first * (Codes::columns / 32) * (Single ? 64 : 512), line = (int64_t)a.x_units * (Single ? 64 : 512);
            barrier_arrive_expect(base + l.x_full, Tokens8 * bytes);
            for (int nt = 0; nt < Tokens8; nt++) { copy_bulk(base + l.x + nt * bytes, a.x + nt * line + place, bytes, base + l.x_full); }
        }
        __syncwarp();
        small_finish<Tokens8, Warps, Tiles>(a, base, l, first, step, lane, rank, cluster);
    } else {
        ql_cuda_wait_previous();
        small_consume<Codes, Tokens8, Single, Parts, Warps, Units, Tiles>(a, base, l, k, first, step, warp, lane);
    }
}

#endif

/* ---- the kernels ------------------------------------------------------------------------------------------------ */

template <typename Codes, int Tokens8, bool Single, int Parts, int Units, int MaxWarps, int Blocks>
__global__ void __launch_bounds__(MaxWarps *WARP, Blocks) small_register(const __grid_constant__ small_args a) {
    small_register_body<Codes, Tokens8, Single, Parts, Units>(a);
}

template <typename Codes, int Tokens8, bool Single, int Parts, int Warps, int Units, int Tiles, int Blocks>
__global__ void __launch_bounds__((Warps + 2) * WARP, Blocks) small_ring(const __grid_constant__ small_args a) {
#ifdef QL_HAS_BULK_COPY
    small_ring_body<Codes, Tokens8, Single, Parts, Warps, Units, Tiles>(a);
#endif
}

#endif
