/* Winograd's convolution F(2x2, 3x3) and F(4x4, 3x3), one block of tiles after another. The paper and the matrices are
 * in project/compression/winograd/convolution.py; winograd.py in this folder says why blocks are used.
 *
 * A block of tiles goes through three steps while it is in the second-level cache. The first step makes the transformed
 * input `v` [position][tile][channel]. The second step makes the products `m` [tile][position][out channel], for one
 * panel of output channels at a time. The third step makes the output. A product keeps ROWS tiles times two vectors of
 * output channels in registers. Nothing is summed across blocks, so the result depends neither on the number of blocks
 * nor on the number of threads.
 *
 * A tile of the input is `side` = tile + 2 pixels wide; a position is one of its side * side elements.
 */
#ifndef BFLOAT16
#ifdef __AVX512F__
#define LANES 16
#define ROWS 14 /* tiles of a product: 14 * 2 sums and 2 weights fit into 32 registers */
#else
#define ROWS 6 /* 6 * 2 sums and 2 weights fit into 16 registers */
#endif
#include <omp.h>

#include "vectors.h"

#define PANEL (2 * LANES) /* output channels of a panel; the last panel may have only one vector */
#define MAX_SIDE 6
#define MAX_POSITIONS (MAX_SIDE * MAX_SIDE)
#define CACHE (640 * 1024) /* bytes of v and m together; they fit into a second-level cache of a megabyte */
#define ALIGNED 64
#define UNROLL _Pragma("GCC unroll 36")

typedef struct {
    int64_t images, height, width, channels, out_channels, pad_height, pad_width;
    int64_t tile; /* side of a tile of the output: 2 or 4 */
    int64_t out_height, out_width, down, across; /* down, across: number of tiles of an image in each direction */
} layer;

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t winograd_lanes(void) { return LANES; }

/* B^T times one column (or row) of a tile of the input (Lavin & Gray 2016, sec. 4). */
INLINE void transform_in(const vec *d, vec *t, const int step, const int side) {
    if (side == 4) {
        vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
        t[0] = d0 - d2;
        t[step] = d1 + d2;
        t[2 * step] = d2 - d1;
        t[3 * step] = d1 - d3;
    } else {
        vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
        vec a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = d3 - d1;
        t[0] = 4 * d0 + (d4 - 5 * d2);
        t[step] = a + b;
        t[2 * step] = a - b;
        t[3 * step] = c + 2 * e;
        t[4 * step] = c - 2 * e;
        t[5 * step] = 4 * d1 + (d5 - 5 * d3);
    }
}

/* A^T times one column (or row) of the products. */
INLINE void transform_out(const vec *m, vec *y, const int step, const int side) {
    vec s = m[step] + m[2 * step], d = m[step] - m[2 * step];
    if (side == 4) {
        y[0] = m[0] + s;
        y[step] = d - m[3 * step];
    } else {
        vec t = m[3 * step] + m[4 * step], e = m[3 * step] - m[4 * step];
        y[0] = m[0] + s + t;
        y[step] = d + 2 * e;
        y[2 * step] = s + 4 * t;
        y[3 * step] = d + 8 * e + m[5 * step];
    }
}

/* A vector of `count` values, filled with zeros, which reads nothing behind the last value. */
INLINE vec load_tail(const float *p, int64_t count) {
    float values[LANES] = {0};
    memcpy(values, p, count * sizeof *p);
    return load_float(values);
}

/* The address of each pixel of a tile. It is that of `nothing`, which holds zeros, if the pixel is in the padding or
 * beyond the last line or column. */
INLINE void find_pixels(const float *x, const layer *l, int64_t number, const float *nothing, const float **at) {
    int64_t tiles = l->down * l->across, image = number / tiles, side = l->tile + 2;
    int64_t top = number % tiles / l->across * l->tile - l->pad_height;
    int64_t left = number % l->across * l->tile - l->pad_width;
    for (int64_t i = 0; i < side; i++)
        for (int64_t j = 0; j < side; j++) {
            int64_t h = top + i, w = left + j;
            int inside = h >= 0 && h < l->height && w >= 0 && w < l->width;
            at[i * side + j] = inside ? x + ((image * l->height + h) * l->width + w) * l->channels : nothing;
        }
}

/* B^T d B for one vector of channels of a tile. If the last vector is not full, its end holds channels of the next
 * pixel, which are never multiplied. Nothing is read behind the `end` of the map. */
INLINE void transform_vector(const float **at, int64_t c, int64_t count, const float *end, float *v, int64_t plane,
                             const int side) {
    vec d[MAX_POSITIONS], t[MAX_POSITIONS];
    UNROLL for (int i = 0; i < side * side; i++) {
        const float *p = at[i] + c;
        d[i] = count < LANES && p < end && p + LANES > end ? load_tail(p, count) : load_float(p);
    }
    UNROLL for (int j = 0; j < side; j++) transform_in(d + j, t + j, side, side);
    UNROLL for (int i = 0; i < side; i++) transform_in(t + i * side, d + i * side, 1, side);
    UNROLL for (int i = 0; i < side * side; i++) store_float(v + i * plane + c, d[i]);
}

/* B^T d B for all channels of a tile. */
INLINE void transform_tile(const float **at, int64_t channels, const float *end, float *v, int64_t plane,
                           const int side) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) transform_vector(at, c, LANES, end, v, plane, side);
    if (c < channels) transform_vector(at, c, channels - c, end, v, plane, side);
}

/* The product of `rows` tiles and `vecs` vectors of output channels at one position, summed over the channels. */
INLINE void multiply_rows(const float *v, int64_t row, const float *u, int64_t channels, float *m, int64_t m_row,
                          const int rows, const int vecs) {
    vec sums[ROWS][2] = {{{0}}};
    for (int64_t c = 0; c < channels; c++) {
        vec weights[2];
        UNROLL for (int k = 0; k < vecs; k++) weights[k] = load_float(u + (c * vecs + k) * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int k = 0; k < vecs; k++) sums[r][k] += v[r * row + c] * weights[k];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int k = 0; k < vecs; k++) store_float(m + r * m_row + k * LANES, sums[r][k]);
}

/* A constant number of rows lets the compiler keep all sums in registers. */
#define CASE(n) \
    case n: return multiply_rows(v, row, u, channels, m, m_row, n, vecs)
INLINE void multiply_some(const float *v, int64_t row, const float *u, int64_t channels, float *m, int64_t m_row,
                          int64_t rows, const int vecs) {
    switch (rows) {
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#if ROWS > 6
        CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
#endif
    }
}

/* The products of all tiles of a block at one position, in pieces of nearly equal numbers of tiles, at most ROWS. */
static void multiply(const float *v, int64_t row, const float *u, int64_t channels, float *m, int64_t m_row,
                     int64_t tiles, int64_t vecs) {
    int64_t pieces = (tiles + ROWS - 1) / ROWS;
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t first = tiles * piece / pieces, rows = tiles * (piece + 1) / pieces - first;
        const float *from = v + first * row;
        float *to = m + first * m_row;
        if (vecs == 2)
            multiply_some(from, row, u, channels, to, m_row, rows, 2);
        else
            multiply_some(from, row, u, channels, to, m_row, rows, 1);
    }
}

/* A^T m A + bias for one vector of output channels of a tile. Pixels outside the output are not written. */
INLINE void write_vector(const float *m, int64_t vecs, vec bias, float *y, const layer *l, int64_t lines,
                         int64_t columns, int64_t count, const int side) {
    const int tile = side - 2;
    vec p[MAX_POSITIONS], s[MAX_POSITIONS], out[MAX_POSITIONS];
    UNROLL for (int i = 0; i < side * side; i++) p[i] = load_float(m + i * vecs * LANES);
    UNROLL for (int j = 0; j < side; j++) transform_out(p + j, s + j, side, side);
    UNROLL for (int i = 0; i < tile; i++) transform_out(s + i * side, out + i * side, 1, side);
    UNROLL for (int i = 0; i < tile; i++)
        UNROLL for (int j = 0; j < tile; j++)
            if (i < lines && j < columns) {
                vec value = out[i * side + j] + bias;
                float *to = y + (i * l->out_width + j) * l->out_channels;
                if (count == LANES)
                    store_float(to, value);
                else if (count == LANES / 2)
                    store_floats(to, value, LANES / 2);
                else
                    memcpy(to, &value, count * sizeof *to);
            }
}

/* The output of one tile, for the channels of one panel from channel k on. */
INLINE void write_tile(const float *m, int64_t vecs, const float *bias, int64_t k, float *y, const layer *l,
                       int64_t number, const int side) {
    int64_t tiles = l->down * l->across, image = number / tiles, tile = side - 2;
    int64_t top = number % tiles / l->across * tile, left = number % l->across * tile;
    int64_t lines = l->out_height - top, columns = l->out_width - left;
    y += ((image * l->out_height + top) * l->out_width + left) * l->out_channels;
    for (int64_t n = 0; n < vecs && k < l->out_channels; n++, k += LANES) {
        int64_t count = smaller(l->out_channels - k, LANES);
        vec own = !bias ? (vec){0} : count < LANES ? load_tail(bias + k, count) : load_float(bias + k);
        write_vector(m + n * LANES, vecs, own, y + k, l, lines, columns, count, side);
    }
}

/* All three steps for the tiles first to last - 1 and all output channels. */
INLINE void run_block(const float *x, const float *panels, const float *bias, float *y, const layer *l, int64_t first,
                      int64_t last, const float *nothing, float *v, float *m, const int side) {
    const int positions = side * side;
    const float *end = x + l->images * l->height * l->width * l->channels;
    int64_t tiles = last - first, row = round_up(l->channels, LANES) + LANES, plane = tiles * row;
    for (int64_t t = 0; t < tiles; t++) {
        const float *at[MAX_POSITIONS];
        find_pixels(x, l, first + t, nothing, at);
        transform_tile(at, l->channels, end, v + t * row, plane, side);
    }
    for (int64_t k = 0; k < l->out_channels; k += PANEL) {
        int64_t vecs = l->out_channels - k > LANES ? 2 : 1, m_row = positions * vecs * LANES;
        const float *u = panels + k * positions * l->channels;
        for (int64_t p = 0; p < positions; p++)
            multiply(v + p * plane, row, u + p * l->channels * vecs * LANES, l->channels, m + p * vecs * LANES, m_row,
                     tiles, vecs);
        for (int64_t t = 0; t < tiles; t++) write_tile(m + t * m_row, vecs, bias, k, y, l, first + t, side);
    }
}

/* The number of tiles of a block: one to eight pieces of ROWS tiles, as many as fit into the cache. */
static int64_t tiles_of_block(const layer *l) {
    int64_t side = l->tile + 2, bytes = side * side * (round_up(l->channels, LANES) + LANES + PANEL) * sizeof(float);
    int64_t pieces = CACHE / (bytes * ROWS);
    return (pieces < 1 ? 1 : pieces > 8 ? 8 : pieces) * ROWS;
}

/* The whole convolution. x: [images][height][width][channels]. panels: the transformed weights,
 * [panel][position][channel][PANEL]. bias: out_channels numbers, or null. y: [images][out_height][out_width]
 * [out_channels]. Returns 0 if there is no memory; y is then not complete. */
int winograd(const float *x, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t out_channels,
             int64_t pad_height, int64_t pad_width, int64_t tile, const float *panels, const float *bias, float *y) {
    int64_t out_height = height + 2 * pad_height - 2, out_width = width + 2 * pad_width - 2;
    int64_t down = round_up(out_height, tile) / tile, across = round_up(out_width, tile) / tile;
    layer l = {images, height, width, channels, out_channels, pad_height, pad_width, tile, out_height, out_width, down, across};
    int64_t tiles = images * down * across, size = tiles_of_block(&l), threads = omp_get_max_threads();
    int64_t blocks = smaller(round_up((tiles + size - 1) / size, threads), tiles);
    int64_t positions = (tile + 2) * (tile + 2), row = round_up(channels, LANES) + LANES, failed = 0;
    int64_t floats = round_up(row + positions * size * (row + PANEL), ALIGNED);
#pragma omp parallel reduction(+ : failed)
    {
        float *nothing = aligned_alloc(ALIGNED, floats * sizeof *nothing), *v = nothing + row;
        if (nothing) memset(nothing, 0, row * sizeof *nothing);
        failed = !nothing;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = tiles * block / blocks, last = tiles * (block + 1) / blocks;
            if (!nothing) continue;
            if (tile == 2)
                run_block(x, panels, bias, y, &l, first, last, nothing, v, v + positions * size * row, 4);
            else
                run_block(x, panels, bias, y, &l, first, last, nothing, v, v + positions * size * row, 6);
        }
        free(nothing);
    }
    return !failed;
}
#endif
