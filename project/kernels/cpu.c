/* Batch norm with ReLU and max pooling, forward and backward, for training on CPUs. Papers and formulas: layers.py here.
 *
 * Sums run in float within a block of rows (pixels) and in double over the blocks, which are cut by the number of rows
 * alone: the result does not depend on the number of threads.
 */
#include "vectors.h"

#define TILE 4 /* vectors of channels that are summed at once */
#define BLOCK 64

static int64_t count_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }
static int64_t min_rows(int64_t a, int64_t b) { return a < b ? a : b; }

/* Add up the blocks' two sums per channel, in order: [blocks][2][channels] -> [2][channels]. */
static void add_blocks(const float *parts, int64_t blocks, int64_t channels, double *sums) {
    memset(sums, 0, 2 * channels * sizeof *sums);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < 2 * channels; c++) sums[c] += parts[b * 2 * channels + c];
}

/* Sums of x - first and of its square over n rows; `first` is a pixel of x, which keeps the difference of squares exact. */
INLINE void moments_of(const real *x, const real *first, int64_t n, int64_t channels, float *sum, float *square,
                       const int tile) {
    vec s[TILE] = {{0}}, q[TILE] = {{0}}, k[TILE];
    for (int t = 0; t < tile; t++) k[t] = load(first + t * LANES);
    for (int64_t r = 0; r < n; r++)
        for (int t = 0; t < tile; t++) {
            vec v = load(x + r * channels + t * LANES) - k[t];
            s[t] += v;
            q[t] += v * v;
        }
    for (int t = 0; t < tile; t++) {
        store_float(sum + t * LANES, s[t]);
        store_float(square + t * LANES, q[t]);
    }
}

/* y = max(0, scale * x + shift) with x's own mean and variance, which the running ones move towards; NaN stays NaN.
 * saved [4][channels]: scale, shift, mean, 1 / standard deviation. Returns 0, with nothing done, when memory is short. */
int batch_norm_relu(const real *x, int64_t rows, int64_t channels, const float *weight, const float *bias, float eps,
                    float momentum, float *running_mean, float *running_var, float *saved, real *y) {
    int64_t blocks = count_blocks(rows);
    float *scale = saved, *shift = saved + channels, *mean = saved + 2 * channels, *inverse = saved + 3 * channels;
    float *parts = malloc(blocks * 2 * channels * sizeof *parts);
    double *sums = malloc(2 * channels * sizeof *sums);
    if (!parts || !sums) {
        free(parts);
        free(sums);
        return 0;
    }
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const real *from = x + b * BLOCK * channels;
        float *sum = parts + b * 2 * channels, *square = sum + channels;
        int64_t n = min_rows(BLOCK, rows - b * BLOCK), c = 0;
        for (; c + TILE * LANES <= channels; c += TILE * LANES)
            moments_of(from + c, x + c, n, channels, sum + c, square + c, TILE);
        for (; c < channels; c += LANES) moments_of(from + c, x + c, n, channels, sum + c, square + c, 1);
    }
    add_blocks(parts, blocks, channels, sums);
    for (int64_t c = 0; c < channels; c++) {
        float first[LANES];
        store_float(first, load(x + c / LANES * LANES));
        double offset = sums[c] / rows, variance = sums[channels + c] / rows - offset * offset;
        variance = variance < 0 ? 0 : variance; /* NaN stays */
        mean[c] = (float)(first[c % LANES] + offset);
        inverse[c] = (float)(1 / sqrt(variance + eps));
        scale[c] = weight[c] * inverse[c];
        shift[c] = bias[c] - mean[c] * scale[c];
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_var[c] += momentum * ((float)(variance * rows / (rows - 1)) - running_var[c]);
    }
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < channels; c += LANES) {
            vec v = load(x + r * channels + c) * load_float(scale + c) + load_float(shift + c);
            store(y + r * channels + c, choose(v < 0, (vec){0}, v));
        }
    free(parts);
    free(sums);
    return 1;
}

/* The gradient behind the ReLU: grad where it was open. */
INLINE vec behind_relu(vec x, vec scale, vec shift, vec grad) { return choose(x * scale + shift <= 0, (vec){0}, grad); }

INLINE void grad_sums_of(const real *x, const real *grad, int64_t n, int64_t channels, int64_t stride,
                         const float *saved, float *sum, float *product, const int tile) {
    vec s[TILE] = {{0}}, q[TILE] = {{0}};
    for (int64_t r = 0; r < n; r++)
        for (int t = 0; t < tile; t++) {
            int64_t c = t * LANES;
            vec v = load(x + r * channels + c);
            vec g = behind_relu(v, load_float(saved + c), load_float(saved + channels + c), load(grad + r * stride + c));
            s[t] += g;
            q[t] += g * (v - load_float(saved + 2 * channels + c));
        }
    for (int t = 0; t < tile; t++) {
        store_float(sum + t * LANES, s[t]);
        store_float(product + t * LANES, q[t]);
    }
}

/* Gradients of the above, from the one of y, whose rows lie `stride` values apart. With g behind the ReLU and
 * x' = (x - mean) / sd: dbias = sum g, dweight = sum g x', dx = weight / sd * (g - dbias / rows - x' dweight / rows).
 * Returns 0, with nothing done, when memory is short. */
int batch_norm_relu_grad(const real *x, const real *grad, int64_t rows, int64_t channels, int64_t stride,
                         const float *saved, real *dx, float *dweight, float *dbias) {
    int64_t blocks = count_blocks(rows);
    const float *scale = saved, *shift = saved + channels, *mean = saved + 2 * channels, *inverse = saved + 3 * channels;
    float *parts = malloc(blocks * 2 * channels * sizeof *parts), *slope = malloc(2 * channels * sizeof *slope);
    double *sums = malloc(2 * channels * sizeof *sums);
    if (!parts || !slope || !sums) {
        free(parts);
        free(slope);
        free(sums);
        return 0;
    }
    float *offset = slope + channels;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const real *from = x + b * BLOCK * channels, *grads = grad + b * BLOCK * stride;
        float *sum = parts + b * 2 * channels, *product = sum + channels;
        int64_t n = min_rows(BLOCK, rows - b * BLOCK), c = 0;
        for (; c + TILE * LANES <= channels; c += TILE * LANES)
            grad_sums_of(from + c, grads + c, n, channels, stride, saved + c, sum + c, product + c, TILE);
        for (; c < channels; c += LANES)
            grad_sums_of(from + c, grads + c, n, channels, stride, saved + c, sum + c, product + c, 1);
    }
    add_blocks(parts, blocks, channels, sums);
    for (int64_t c = 0; c < channels; c++) {
        dbias[c] = (float)sums[c];
        dweight[c] = (float)(sums[channels + c] * inverse[c]);
        slope[c] = -scale[c] * inverse[c] * dweight[c] / rows;
        offset[c] = -scale[c] * dbias[c] / rows - slope[c] * mean[c];
    }
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < channels; c += LANES) {
            vec v = load(x + r * channels + c), a = load_float(scale + c);
            vec g = behind_relu(v, a, load_float(shift + c), load(grad + r * stride + c));
            store(dx + r * channels + c, a * g + load_float(slope + c) * v + load_float(offset + c));
        }
    free(parts);
    free(slope);
    free(sums);
    return 1;
}

/* Numbers as integers of the same order, NaN above all; the way back is `reorder`. */
INLINE row reorder(row h) { return h ^ ((h >> SIGN_SHIFT) & ALL_BUT_SIGN); }
INLINE row ordered(row h) {
    row nan = (h & ALL_BUT_SIGN) > INFINITE;
    return (reorder(h) & ~nan) | (nan & ALL_BUT_SIGN);
}

/* One pixel of a window: where it lies, and its number in the window, counted line by line. */
typedef struct {
    int64_t at;
    bits number;
} tap;
#define MAX_KERNEL 15

/* The greatest value of each window, and the number of the pixel in it that holds it: the first of equals; NaN wins. */
void max_pool(const real *x, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t out_height,
              int64_t out_width, int64_t kernel, int64_t stride, int64_t padding, real *y, bits *place) {
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < images * out_height; line++) {
        int64_t image = line / out_height, top = line % out_height * stride - padding;
        for (int64_t column = 0; column < out_width; column++) {
            int64_t left = column * stride - padding, out = (line * out_width + column) * channels;
            tap taps[MAX_KERNEL * MAX_KERNEL];
            int count = 0;
            for (int64_t i = 0; i < kernel; i++)
                for (int64_t j = 0; j < kernel; j++) {
                    int64_t h = top + i, w = left + j;
                    if (h >= 0 && h < height && w >= 0 && w < width)
                        taps[count++] = (tap){((image * height + h) * width + w) * channels, (bits)(i * kernel + j)};
                }
            for (int64_t c = 0; c < channels; c += LANES) {
                row best = ordered(load_row(x + taps[0].at + c)), where = (row){0} + taps[0].number;
                for (int t = 1; t < count; t++) {
                    row v = ordered(load_row(x + taps[t].at + c)), better = v > best;
                    best = (v & better) | (best & ~better);
                    where = (((row){0} + taps[t].number) & better) | (where & ~better);
                }
                store_row(y + out + c, reorder(best));
                store_row(place + out + c, where);
            }
        }
    }
}

/* Each pixel collects the gradients of the windows that chose it. */
void max_pool_grad(const real *grad, const bits *place, int64_t images, int64_t height, int64_t width, int64_t channels,
                   int64_t out_height, int64_t out_width, int64_t kernel, int64_t stride, int64_t padding, real *dx) {
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < images * height; line++) {
        int64_t image = line / height, h = line % height + padding;
        int64_t first_line = h < kernel ? 0 : (h - kernel) / stride + 1;
        for (int64_t column = 0; column < width; column++) {
            int64_t w = column + padding, first_column = w < kernel ? 0 : (w - kernel) / stride + 1;
            int64_t in = (line * width + column) * channels;
            tap windows[MAX_KERNEL * MAX_KERNEL];
            int count = 0;
            for (int64_t i = first_line; i < out_height && i * stride <= h; i++)
                for (int64_t j = first_column; j < out_width && j * stride <= w; j++)
                    windows[count++] = (tap){((image * out_height + i) * out_width + j) * channels,
                                             (bits)((h - i * stride) * kernel + w - j * stride)};
            for (int64_t c = 0; c < channels; c += LANES) {
                if (count == 1) { /* nothing to add up, nothing to round */
                    row chosen = load_row(place + windows[0].at + c) == windows[0].number;
                    store_row(dx + in + c, load_row(grad + windows[0].at + c) & chosen);
                    continue;
                }
                vec sum = {0};
                for (int t = 0; t < count; t++) {
                    row chosen = load_row(place + windows[t].at + c) == windows[t].number;
                    sum += widen(load_row(grad + windows[t].at + c) & chosen);
                }
                store(dx + in + c, sum);
            }
        }
    }
}
