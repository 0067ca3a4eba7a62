/* Max pooling, forward and backward, for training on CPUs. max_pool.py in this folder says what it computes. */
#ifdef __AVX512BW__
#define LANES 16
#endif
#include "vectors.h"

#define TILE 4 /* vectors of channels that are handled at once */
#define MAX_KERNEL 15

/* Integers that have the order of the numbers, with NaN above all numbers. `reorder` turns them back into numbers.
 *
 * The bits of a positive float, read as an integer, have the order of the numbers. Those of a negative float have the
 * opposite order, so all bits but the sign are inverted. */
INLINE row reorder(row h) { return h ^ ((h >> SIGN_SHIFT) & ALL_BUT_SIGN); }
INLINE row ordered(row h) {
    row nan = (h & ALL_BUT_SIGN) > INFINITE;
    return (reorder(h) & ~nan) | (nan & ALL_BUT_SIGN);
}

/* One pixel of a window: its place in memory, and its number in the window, counted line by line. */
typedef struct {
    int64_t at;
    bits number;
} tap;

/* The greatest value of a window and its number in the window, for `tile` vectors of channels. The first of equal
 * values wins; NaN wins over all numbers. */
INLINE void choose_tap(const real *x, const tap *taps, int count, real *y, bits *place, const int tile,
                       const int lanes) {
    row best[TILE], where[TILE];
    for (int k = 0; k < tile; k++) {
        best[k] = ordered(load_bits(x + taps[0].at + k * LANES, lanes));
        where[k] = (row){0} + taps[0].number;
    }
    for (int t = 1; t < count; t++) {
        const real *from = x + taps[t].at;
        row number = (row){0} + taps[t].number;
        for (int k = 0; k < tile; k++) {
            row v = ordered(load_bits(from + k * LANES, lanes)), better = v > best[k];
            best[k] = choose_bits(better, v, best[k]);
            where[k] = choose_bits(better, number, where[k]);
        }
    }
    for (int k = 0; k < tile; k++) {
        store_bits(y + k * LANES, reorder(best[k]), lanes);
        store_bits(place + k * LANES, where[k], lanes);
    }
}

/* y: the greatest value of each window. place: the number, in the window, of the pixel that has it. */
void max_pool(const real *x, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t out_height,
              int64_t out_width, int64_t kernel, int64_t stride, int64_t padding, real *y, bits *place) {
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < images * out_height; line++) {
        int64_t image = line / out_height, top = line % out_height * stride - padding;
        for (int64_t column = 0; column < out_width; column++) {
            int64_t left = column * stride - padding, out = (line * out_width + column) * channels, c = 0;
            tap taps[MAX_KERNEL * MAX_KERNEL];
            int count = 0;
            for (int64_t i = 0; i < kernel; i++)
                for (int64_t j = 0; j < kernel; j++) {
                    int64_t h = top + i, w = left + j;
                    if (h >= 0 && h < height && w >= 0 && w < width)
                        taps[count++] = (tap){((image * height + h) * width + w) * channels, (bits)(i * kernel + j)};
                }
            for (; c + TILE * LANES <= channels; c += TILE * LANES)
                choose_tap(x + c, taps, count, y + out + c, place + out + c, TILE, LANES);
            for (; c + LANES <= channels; c += LANES)
                choose_tap(x + c, taps, count, y + out + c, place + out + c, 1, LANES);
            if (c < channels) choose_tap(x + c, taps, count, y + out + c, place + out + c, 1, 8);
        }
    }
}

/* The gradient of one pixel, for `tile` vectors of channels: the sum of the gradients of the windows that it won. */
INLINE void collect(const real *grad, const bits *place, const tap *windows, int count, real *dx, const int tile,
                    const int lanes) {
    if (count == 1) { /* only one window: nothing is added, so nothing is rounded */
        for (int k = 0; k < tile; k++) {
            int64_t at = windows[0].at + k * LANES;
            row chosen = load_bits(place + at, lanes) == windows[0].number;
            store_bits(dx + k * LANES, load_bits(grad + at, lanes) & chosen, lanes);
        }
        return;
    }
    vec sums[TILE] = {{0}};
    for (int t = 0; t < count; t++) {
        row number = (row){0} + windows[t].number;
        for (int k = 0; k < tile; k++) {
            int64_t at = windows[t].at + k * LANES;
            sums[k] += widen(load_bits(grad + at, lanes) & (load_bits(place + at, lanes) == number));
        }
    }
    for (int k = 0; k < tile; k++) store_some(dx + k * LANES, sums[k], lanes);
}

/* dx: each pixel collects the gradients of the windows that it won. `windows` are all windows that contain the pixel,
 * each with the number that the pixel has in it. */
void max_pool_grad(const real *grad, const bits *place, int64_t images, int64_t height, int64_t width, int64_t channels,
                   int64_t out_height, int64_t out_width, int64_t kernel, int64_t stride, int64_t padding, real *dx) {
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < images * height; line++) {
        int64_t image = line / height, h = line % height + padding;
        int64_t first_line = h < kernel ? 0 : (h - kernel) / stride + 1;
        for (int64_t column = 0; column < width; column++) {
            int64_t w = column + padding, first_column = w < kernel ? 0 : (w - kernel) / stride + 1;
            int64_t in = (line * width + column) * channels, c = 0;
            tap windows[MAX_KERNEL * MAX_KERNEL];
            int count = 0;
            for (int64_t i = first_line; i < out_height && i * stride <= h; i++)
                for (int64_t j = first_column; j < out_width && j * stride <= w; j++)
                    windows[count++] = (tap){((image * out_height + i) * out_width + j) * channels,
                                             (bits)((h - i * stride) * kernel + w - j * stride)};
            for (; c + TILE * LANES <= channels; c += TILE * LANES)
                collect(grad + c, place + c, windows, count, dx + in + c, TILE, LANES);
            for (; c + LANES <= channels; c += LANES)
                collect(grad + c, place + c, windows, count, dx + in + c, 1, LANES);
            if (c < channels) collect(grad + c, place + c, windows, count, dx + in + c, 1, 8);
        }
    }
}
