/* linear_wide_store.cuh: the end of an item of linear_wide.cuh, and in part of linear_decoded.cuh: what becomes of its sums.
 *
 * Where a cluster splits K, fragments are dealt out to its blocks, WIDE_ROUND of each warp at a time, and added there in the order of the blocks. Then
 * they are turned in shared memory, so that lanes store, or add to what is there, 16 bytes of a token each; a warpgroup stores its own, while the other
 * may still, or already, multiply. Items of which outputs are missing (the last of a matrix), of two parts, where 16 bytes cannot be stored, or with an adapter,
 * are stored fragment by fragment.
 * The code is kept short and straight: it runs once an item, and what has to be fetched or branches then costs more than what it does. */
#ifndef QL_CUDA_LINEAR_WIDE_STORE_CUH
#define QL_CUDA_LINEAR_WIDE_STORE_CUH

#include "linear_wide_place.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---- sums of an item ------------------------------------------------------------------------------------------------ */

/* Rounds of WIDE_ROUND fragments of a warp go to two places by turns. Fragment i of a round is added by block i % splits of those that split K. There it
 * stands, as the products leave it, beside those of the other blocks, in the order of their ranks. */
__device__ __forceinline__ uint32_t wide_received(const wide_place &p, int round, int i, int rank) {
    return p.base + p.l.received + ((round % 2 * WIDE_TILES + p.warp) * WIDE_ROUND + (i >> p.shift << p.shift) + rank) * CHUNK;
}
__device__ __forceinline__ uint32_t wide_received_full(const wide_place &p, int round, int warp) { return p.base + p.l.received_full + 8 * (2 * warp + round % 2); }
__device__ __forceinline__ uint32_t wide_received_free(const wide_place &p, int round, int warp) { return p.base + p.l.received_free + 8 * (2 * warp + round % 2); }

/* fragments `first` .. of the warp, once the others have read those of the round but one before */
template <int Tokens8> __device__ __forceinline__ void wide_send(const wide_place &p, int first, int round, const float (&sums)[4 * Tokens8]) {
    uint32_t full = wide_received_full(p, round, p.warp);
    if (p.shift > 0) { barrier_wait(wide_received_free(p, round, p.warp), round / 2 & 1); }
#pragma unroll
    for (int known = 0; known < Tokens8; known += WIDE_ROUND) {
        if (known != first) { continue; }
#pragma unroll
        for (int i = 0; i < WIDE_ROUND; i++) {
            const float *from = sums + 4 * (known + i);
            float4 sum = make_float4(from[0], from[1], from[2], from[3]);
            uint32_t to = wide_received(p, round, i, p.rank) + p.lane * 16;
            int owner = i & ((1 << p.shift) - 1);
            if (owner == p.rank) {
                store_shared(to, sum);
            } else {
                cluster_store_async(cluster_address(to, owner), sum, cluster_address(full, owner));
            }
        }
    }
    __syncwarp();
}
__device__ __forceinline__ void wide_await(const wide_place &p, int round) { barrier_wait(wide_received_full(p, round, p.warp), round / 2 & 1); }

/* What was received of the tile has been read: the other blocks may send the round but one after; its bytes are awaited first. At the end nobody waits
 * for it, and the other blocks may have ended. */
__device__ __forceinline__ void wide_release(const wide_place &p, int round, bool end) {
    __syncwarp();
    if (p.shift == 0 || end) { return; }
    if (p.lane == 0) { barrier_arrive_expect(wide_received_full(p, round, p.warp), (WIDE_ROUND - (WIDE_ROUND >> p.shift)) * CHUNK); }
    __syncwarp();
    if (p.lane < 1 << p.shift && p.lane != p.rank) { barrier_arrive_cluster(cluster_address(wide_received_free(p, round, p.warp), p.lane)); }
}
/* the same before the first item that the cluster shares: the lines that stood there have been stored */
__device__ __forceinline__ void wide_open(const wide_place &p) {
    block_barrier(1, WIDE_TILES * WARP);
    wide_release(p, 0, false), wide_release(p, 1, false);
}

/* What a lane stores of a tile: of token l / 4 of a fragment rows `row` and the next, of the upper unit, and as many from `lower` on. */
struct wide_target {
    char *out;
    const int32_t *rows;
    const float *cos, *sin; /* of the row's angle */
    int row, lower, n, output, line, half; /* line: bytes; half: angles of a position */
    float factor, factor_lower;
};

__device__ __forceinline__ wide_target wide_aim(const small_args &a, const wide_place &p, const small_tile &tile) {
    const small_part &part = a.part[tile.part];
    int row = tile.unit * UNIT_ROWS + p.lane % 4 * 2, n = part.n, output = part.output;
    bool floats = output == SMALL_FLOAT || output == SMALL_FLOAT_ADD, turned = output == SMALL_ROPE;
    wide_target t = {(char *)part.out, part.rows, NULL, NULL, row, row + part.lower_rows, n, output, n * (floats ? 4 : 2), a.d / 2, __ldg(part.factor),
                     __ldg(part.factor_lower)};
    if (turned) { t.cos = a.cos + row % a.d, t.sin = a.sin + row % a.d; }
    if (output == SMALL_SWIGLU && part.ordered) { t.row = ordered_column(row); }
    return t;
}

/* Its four sums of fragment i, upper and lower, added in the order of the blocks. Those of a lane come in an order of its own, so that no two
 * lanes meet in a bank. */
__device__ __forceinline__ float4 wide_add(const wide_place &p, int round, int i) {
    float v[4];
    int q = p.lane % 4;
    uint32_t from = wide_received(p, round, i, 0) + p.lane / 8 * 16 + p.lane / 4 % 2 * 4 + q * 128;
#pragma unroll
    for (int turn = 0; turn < 4; turn++) { /* of turn ^ q, bit 0: row, bit 1: unit */
        v[turn] = load_shared<float>(from + (turn ^ q) % 2 * 64 + (turn ^ q) / 2 * 8);
    }
#pragma unroll 1
    for (int rank = 1; rank < 1 << p.shift; rank++) {
#pragma unroll
        for (int turn = 0; turn < 4; turn++) { v[turn] += load_shared<float>(from + rank * CHUNK + (turn ^ q) % 2 * 64 + (turn ^ q) / 2 * 8); }
    }
    float a = q & 1 ? v[1] : v[0], b = q & 1 ? v[0] : v[1], c = q & 1 ? v[3] : v[2], d = q & 1 ? v[2] : v[3];
    return q & 2 ? make_float4(c, d, a, b) : make_float4(a, b, c, d);
}

/* what adapters add to this block's fragments of a round, to what it has of them itself; token8: where the round begins */
__device__ __forceinline__ void wide_add_terms(const small_args &a, const wide_place &p, const small_tile &tile, const wide_target &t, int token8, int round) {
#pragma unroll 1
    for (int i = p.rank; i < WIDE_ROUND; i += 1 << p.shift) {
        uint32_t at = wide_received(p, round, i, p.rank) + p.lane * 16;
        small_target to = {};
        add_terms<false>(to, a, tile, p.lane, token8 + i);
        float4 sum = load_shared<float4>(at); /* they are multiplied by the factors below */
        sum.x += to.old[0] / t.factor, sum.y += to.old[2] / t.factor, sum.z += to.old[1] / t.factor_lower, sum.w += to.old[3] / t.factor_lower;
        store_shared(at, sum);
    }
    __syncwarp();
}

/* adds up and stores this block's fragments of a round */
__device__ __forceinline__ void wide_store(const small_args &a, const wide_place &p, const wide_target &t, int token8, int round) {
    bool floats = t.output == SMALL_FLOAT || t.output == SMALL_FLOAT_ADD;
#pragma unroll 1
    for (int i = p.rank; i < WIDE_ROUND; i += 1 << p.shift) {
        int token = 8 * (token8 + i) + p.lane / 4;
        float4 sum = wide_add(p, round, i);
        float v[2][2] = {{sum.x * t.factor, sum.y * t.factor}, {sum.z * t.factor_lower, sum.w * t.factor_lower}}; /* (unit, row) */
        if (token >= a.m) { continue; }
        char *line = t.out + (int64_t)(t.rows != NULL ? t.rows[token] : token) * t.line;
        int angle = t.output == SMALL_ROPE ? a.positions[token] * t.half : 0;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (t.output == SMALL_ROPE) {
                float2 turned = rope_pair(v[0][e], v[1][e], t.cos[angle + e], t.sin[angle + e]);
                v[0][e] = turned.x, v[1][e] = turned.y;
            }
            if (t.output == SMALL_SWIGLU) { v[0][e] = silu_fast(v[0][e]) * v[1][e]; }
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                int column = (unit ? t.lower : t.row) + e;
                if (column >= t.n || (unit && t.output == SMALL_SWIGLU)) { continue; }
                if (floats) {
                    float *to = (float *)line + column;
                    *to = t.output == SMALL_FLOAT_ADD ? *to + v[unit][e] : v[unit][e];
                } else {
                    ((bf16 *)line)[column] = __float2bfloat16_rn(v[unit][e]);
                }
            }
        }
    }
}

/* what a warp knows of an item */
struct wide_item {
    small_tile first, tile; /* of the item, of the warp */
    int token8, fragments;  /* where its tokens begin, and how many eights there are of them */
    bool there;             /* whether there is such a tile */
};

template <int Tokens8> __device__ __forceinline__ wide_item wide_item_of(const small_args &a, const wide_place &p) {
    int token8 = p.item % p.across * Tokens8;
    return {wide_tile(a, p, 0), wide_tile(a, p, p.warp), token8, min(Tokens8, (a.m + 7) / 8 - token8), wide_tile_number(p, p.warp) < a.tiles};
}

/* any item: fragments are turned in shared memory, and each warp stores its own; round: rounds so far */
template <int Tokens8>
__device__ __forceinline__ void wide_finish_any(const small_args &a, const wide_place &p, const wide_item &item, int &round, const float (&sums)[4 * Tokens8]) {
    wide_target t = wide_aim(a, p, item.tile);
    int fragments = p.shift > 0 ? max(item.fragments, 2 * WIDE_ROUND) : item.fragments; /* both places: what is released is sent to again */
    block_barrier(1, WIDE_TILES * WARP); /* the lines of an item may have stood here */
#pragma unroll 1
    for (int first = 0; first < fragments; first += WIDE_ROUND, round++) {
        wide_send<Tokens8>(p, first, round, sums);
        if (a.adapted) { wide_add_terms(a, p, item.tile, t, item.token8 + first, round); }
        if (p.shift > 0) { wide_await(p, round); }
        if (item.there) { wide_store(a, p, t, item.token8 + first, round); } /* or what is received is dropped */
        wide_release(p, round, p.last && first + 2 * WIDE_ROUND >= fragments);
    }
    block_barrier(1, WIDE_TILES * WARP); /* or may come to stand here */
}

/* ---- items whose outputs are all there: lines of them are put together in shared memory, and stored from there ------------------------ */

/* A warpgroup stores its own tiles. Of a token it has a line: units of 8 outputs, tile after tile, in pieces of 16 bytes; piece c of line i stands at
 * c ^ (i % 8), or i / 2 % 4 where lines are short, so that neither those who write nor those who read meet in a bank. */
template <int Output> struct wide_line {
    enum {
        size = Output == SMALL_FLOAT ? 4 : 2,
        halves = Output == SMALL_SWIGLU ? 1 : 2, /* units of a tile */
        pieces = WIDE_GROUP_TILES * halves * UNIT_ROWS * size / 16,
        bytes = 16 * pieces,
        fragments = WIDE_PLACE / (8 * bytes), /* whose tokens have room in a place */
        lines = 128 / pieces                  /* that a warpgroup stores at once */
    };
    static __device__ __forceinline__ int turn(int line) { return bytes == 64 ? line / 2 % 4 : line % 8; }
    static __device__ __forceinline__ uint32_t piece(int line, int c) { return line * bytes + (c ^ turn(line)) * 16; }
};

/* whether the tiles are all there, of one part, and what 16 bytes can be stored to */
__device__ __forceinline__ bool wide_has_lines(const small_args &a, const wide_item &item, const small_tile &last, bool last_there) {
    const small_part &part = a.part[item.first.part];
    int size = part.output == SMALL_FLOAT || part.output == SMALL_FLOAT_ADD ? 4 : 2;
    return !a.adapted && last_there && last.part == item.first.part && last.unit * UNIT_ROWS + part.lower_rows + UNIT_ROWS <= part.n &&
           (uintptr_t)part.out % 16 == 0 && part.n * size % 16 == 0 &&
           (part.output != SMALL_SWIGLU || !part.ordered || item.first.unit * UNIT_ROWS % NORM_BLOCK == 0);
}

/* what a lane knows of an item: of the sums that it turns into outputs, and of the piece that it stores of every line */
struct wide_lines {
    float factor, factor_lower;
    const float *cos, *sin; /* of its row's angle */
    uint32_t place;         /* where its part of a fragment goes, of the first line */
    int line, piece;        /* the first of those that it stores */
    char *out;              /* where the piece goes, of row 0 */
    int bytes;              /* of a row */
};

template <int Output> __device__ __forceinline__ wide_lines wide_lines_of(const small_args &a, const wide_place &p, const wide_item &item) {
    typedef wide_line<Output> line;
    const small_part &part = a.part[item.tile.part];
    int thread = threadIdx.x % (WIDE_GROUP_TILES * WARP), piece = thread % line::pieces, unit = piece * 16 / (UNIT_ROWS * line::size);
    int group = p.warp / WIDE_GROUP_TILES * WIDE_GROUP_TILES, number = p.warp % WIDE_GROUP_TILES;
    small_tile stored = wide_tile(a, p, group + unit / line::halves);
    int column = stored.unit * UNIT_ROWS + unit % line::halves * part.lower_rows + piece * 16 / line::size % UNIT_ROWS;
    wide_lines l = {__ldg(part.factor), __ldg(part.factor_lower), a.cos, a.sin, 0, thread / line::pieces, piece,
                    (char *)part.out + (int64_t)column * line::size, part.n * line::size};
    if (Output == SMALL_ROPE) {
        int row = (item.tile.unit * UNIT_ROWS + p.lane / 4) % a.d;
        l.cos += row, l.sin += row;
    }
    if (Output == SMALL_FLOAT) { /* one value of two tokens, the second in the next line */
        l.place = line::piece(p.lane % 4 * 2, number * 4 + p.lane / 16) + p.lane / 4 % 4 * 4;
    } else if (Output == SMALL_SWIGLU) { /* a row of one of two matrices, which are fragments */
        l.place = line::piece(p.lane % 16, number);
    } else { /* of one of four: two fragments, upper and lower */
        l.place = line::piece(p.lane / 16 * 8 + p.lane % 8, number * 2 + p.lane / 8 % 2);
    }
    return l;
}

/* the token of line `line` of fragments that are 1 << shift apart, the first one's tokens from 8 token8 on */
__device__ __forceinline__ int wide_token(int line, int token8, int shift) { return 8 * (token8 + (line / 8 << shift)) + line % 8; }

/* where the angles of the position of line `lane` begin */
template <int Output> __device__ __forceinline__ int wide_angle(const small_args &a, int lane, int token8, int shift) {
    return Output == SMALL_ROPE ? __ldg(a.positions + min(wide_token(lane, token8, shift), a.m - 1)) * (a.d / 2) : 0;
}
/* Cosine and sine of the lane's row, of `count` fragments and two tokens of each. They come from far away, all at once, and are asked for before
 * anything is waited for. */
struct wide_turns {
    float2 of[WIDE_ROUND][2];
};
template <int Output> __device__ __forceinline__ wide_turns wide_turns_of(const wide_lines &l, int lane, int angle, int count) {
    wide_turns turns = {};
    if constexpr (Output == SMALL_ROPE) {
#pragma unroll
        for (int j = 0; j < WIDE_ROUND; j++) {
            if (j >= count) { break; }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = __shfl_sync(QL_FULL_WARP, angle, 8 * j + lane % 4 * 2 + i);
                turns.of[j][i] = make_float2(__ldg(l.cos + at), __ldg(l.sin + at));
            }
        }
    }
    return turns;
}

/* rows of `out` of the lines that a lane stores of a place; -1: there is no such token */
struct wide_rows {
    int of[WIDE_TURNS];
};
template <int Output>
__device__ __forceinline__ wide_rows wide_rows_of(const small_args &a, const small_part &part, const wide_lines &l, int lines, int token8, int shift) {
    wide_rows rows;
#pragma unroll
    for (int i = 0; i < WIDE_TURNS; i++) {
        int line = l.line + i * wide_line<Output>::lines, token = wide_token(line, token8, shift);
        rows.of[i] = line >= lines || token >= a.m ? -1 : part.rows != NULL ? __ldg(part.rows + token) : token;
    }
    return rows;
}

/* two fragments' sums as outputs from `stage` on, where the line of the first one's first token begins */
template <int Output>
__device__ __forceinline__ void wide_emit(const wide_lines &l, uint32_t stage, const float2 (&turn)[WIDE_ROUND][2], int first, const float4 (&sum)[WIDE_ROUND]) {
    uint32_t pair[4]; /* (fragment, unit): of two tokens */
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float4 s = sum[first + j];
        float u[2] = {s.x * l.factor, s.y * l.factor}, v[2] = {s.z * l.factor_lower, s.w * l.factor_lower};
        if constexpr (Output == SMALL_FLOAT) {
            uint32_t to = stage + j * 8 * wide_line<Output>::bytes + l.place; /* the lower unit's pieces are two further, the next line's at one bit's turn */
            store_shared(to, u[0]), store_shared(to ^ 32, v[0]);
            to = (to ^ 16) + wide_line<Output>::bytes;
            store_shared(to, u[1]), store_shared(to ^ 32, v[1]);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (Output == SMALL_ROPE) {
                    float2 turned = rope_pair(u[i], v[i], turn[first + j][i].x, turn[first + j][i].y);
                    u[i] = turned.x, v[i] = turned.y;
                }
                if (Output == SMALL_SWIGLU) { u[i] = silu_fast(u[i]) * v[i]; }
            }
            pair[2 * j] = pack_bf16(u[0], u[1]), pair[2 * j + 1] = pack_bf16(v[0], v[1]);
        }
    }
    if constexpr (Output == SMALL_SWIGLU) {
        store_transposed(stage + l.place, pair[0], pair[2]);
    } else if constexpr (Output != SMALL_FLOAT) {
        store_transposed(stage + l.place, pair[0], pair[1], pair[2], pair[3]);
    }
}

/* stores the lines at `stage`, once the warpgroup has put them there */
template <int Output> __device__ __forceinline__ void wide_store_lines(const small_part &part, const wide_lines &l, uint32_t stage, const wide_rows &rows) {
    typedef wide_line<Output> line;
#pragma unroll
    for (int i = 0; i < WIDE_TURNS; i++) {
        if (rows.of[i] < 0) { continue; }
        int at = l.line + i * line::lines;
        char *to = l.out + (int64_t)rows.of[i] * l.bytes;
        if (Output == SMALL_SWIGLU && part.ordered) { /* pair `piece` of each unit */
            uint32_t v[WIDE_GROUP_TILES];
#pragma unroll
            for (int unit = 0; unit < WIDE_GROUP_TILES; unit++) { v[unit] = load_shared<uint32_t>(stage + line::piece(at, unit) + l.piece * 4); }
            *(uint4 *)to = make_uint4(v[0], v[1], v[2], v[3]);
            continue;
        }
        float4 v = load_shared<float4>(stage + line::piece(at, l.piece));
        if (Output == SMALL_FLOAT && part.output == SMALL_FLOAT_ADD) {
            add_vector((float *)to, v);
        } else {
            *(float4 *)to = v;
        }
    }
}

__device__ __forceinline__ void wide_group_barrier(const wide_place &p) { block_barrier(4 + p.warp / WIDE_GROUP_TILES, WIDE_GROUP_TILES * WARP); }

/* An item whose K the blocks of the cluster split, two rounds at once. The other blocks may send again as soon as the sums are added up. */
template <int Tokens8, int Output>
__device__ __forceinline__ void wide_finish_split(const small_args &a, const wide_place &p, const wide_item &item, const wide_lines &l, int &round,
                                                  const float (&sums)[4 * Tokens8]) {
    const small_part &part = a.part[item.tile.part];
    uint32_t stage = p.base + p.l.staging + p.warp / WIDE_GROUP_TILES * WIDE_PLACE;
    int mine = 2 * WIDE_ROUND >> p.shift; /* fragments of two rounds */
    int angle = wide_angle<Output>(a, p.lane, item.token8 + p.rank, p.shift);
#pragma unroll 1
    for (int first = 0; first < item.fragments; first += 2 * WIDE_ROUND, round += 2) {
        bool end = p.last && first + 2 * WIDE_ROUND >= item.fragments;
        wide_turns turns = wide_turns_of<Output>(l, p.lane, angle, mine);
        angle = wide_angle<Output>(a, p.lane, item.token8 + first + 2 * WIDE_ROUND + p.rank, p.shift); /* of the next two */
        wide_rows rows = wide_rows_of<Output>(a, part, l, 8 * mine, item.token8 + first + p.rank, p.shift);
        float4 sum[WIDE_ROUND]; /* number j: fragment rank + j splits of both rounds */
        wide_send<Tokens8>(p, first, round, sums), wide_send<Tokens8>(p, first + WIDE_ROUND, round + 1, sums);
        wide_await(p, round), wide_await(p, round + 1);
#pragma unroll
        for (int j = 0; j < WIDE_ROUND; j++) {
            int i = p.rank + (j << p.shift);
            if (j >= mine) { break; }
            uint32_t from = wide_received(p, round + i / WIDE_ROUND, i % WIDE_ROUND, 0) + p.lane * 16;
            sum[j] = load_shared<float4>(from);
#pragma unroll 1
            for (int rank = 1; rank < 1 << p.shift; rank++) {
                float4 more = load_shared<float4>(from + rank * CHUNK);
                sum[j].x += more.x, sum[j].y += more.y, sum[j].z += more.z, sum[j].w += more.w;
            }
        }
        wide_release(p, round, end), wide_release(p, round + 1, end);
        wide_group_barrier(p); /* what stood there has been read */
#pragma unroll
        for (int j = 0; j < WIDE_ROUND; j += 2) {
            if (j < mine) { wide_emit<Output>(l, stage + j * 8 * wide_line<Output>::bytes, turns.of, j, sum); }
        }
        wide_group_barrier(p);
        wide_store_lines<Output>(part, l, stage, rows);
    }
}

/* an item that is this block's alone: in two places by turns, of which one is what others would send to */
template <int Tokens8, int Output>
__device__ __forceinline__ void wide_finish_alone(const small_args &a, const wide_place &p, const wide_item &item, const wide_lines &l,
                                                  const float (&sums)[4 * Tokens8]) {
    constexpr int fragments = wide_line<Output>::fragments;
    const small_part &part = a.part[item.tile.part];
    int angle[Tokens8 / WIDE_ROUND];
    uint32_t stage = 0;
    wide_rows rows;
#pragma unroll
    for (int i = 0; i < Tokens8 / WIDE_ROUND; i++) { angle[i] = wide_angle<Output>(a, p.lane, item.token8 + i * WIDE_ROUND, 0); }
    wide_turns turns = wide_turns_of<Output>(l, p.lane, angle[0], WIDE_ROUND);
    wide_group_barrier(p); /* the lines of the item ahead have been read */
#pragma unroll
    for (int first = 0; first < Tokens8; first += WIDE_ROUND) {
        if (first % fragments == 0) {
            if (first >= item.fragments) { break; }
            stage = p.base + (first / fragments % 2 ? p.l.staging : p.l.received) + p.warp / WIDE_GROUP_TILES * WIDE_PLACE;
            rows = wide_rows_of<Output>(a, part, l, 8 * fragments, item.token8 + first, 0);
        }
        float4 sum[WIDE_ROUND];
#pragma unroll
        for (int j = 0; j < WIDE_ROUND; j++) {
            const float *from = sums + 4 * (first + j);
            sum[j] = make_float4(from[0], from[1], from[2], from[3]);
        }
#pragma unroll
        for (int j = 0; j < WIDE_ROUND; j += 2) { wide_emit<Output>(l, stage + (first % fragments + j) * 8 * wide_line<Output>::bytes, turns.of, j, sum); }
        if (first + WIDE_ROUND < Tokens8) { turns = wide_turns_of<Output>(l, p.lane, angle[first / WIDE_ROUND + 1], WIDE_ROUND); }
        if ((first + WIDE_ROUND) % fragments == 0) {
            wide_group_barrier(p);
            wide_store_lines<Output>(part, l, stage, rows);
        }
    }
}

template <int Tokens8, int Output>
__device__ __forceinline__ void wide_finish_lines(const small_args &a, const wide_place &p, const wide_item &item, int &round, const float (&sums)[4 * Tokens8]) {
    wide_lines l = wide_lines_of<Output>(a, p, item);
    if (p.shift > 0) {
        wide_finish_split<Tokens8, Output>(a, p, item, l, round, sums);
    } else {
        wide_finish_alone<Tokens8, Output>(a, p, item, l, sums);
    }
}

/* the sums of the turn's item to where they belong; round: rounds so far */
template <int Tokens8> __device__ __forceinline__ void wide_finish(const small_args &a, const wide_place &p, int &round, const float (&sums)[4 * Tokens8]) {
    wide_item item = wide_item_of<Tokens8>(a, p);
    if (!wide_has_lines(a, item, wide_tile(a, p, WIDE_TILES - 1), wide_tile_number(p, WIDE_TILES - 1) < a.tiles)) {
        return wide_finish_any<Tokens8>(a, p, item, round, sums);
    }
    switch (a.part[item.first.part].output) {
    case SMALL_BF16: return wide_finish_lines<Tokens8, SMALL_BF16>(a, p, item, round, sums);
    case SMALL_ROPE: return wide_finish_lines<Tokens8, SMALL_ROPE>(a, p, item, round, sums);
    case SMALL_SWIGLU: return wide_finish_lines<Tokens8, SMALL_SWIGLU>(a, p, item, round, sums);
    default: return wide_finish_lines<Tokens8, SMALL_FLOAT>(a, p, item, round, sums); /* and what is added to */
    }
}

#endif

#endif
