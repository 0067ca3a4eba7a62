/* Batch norm with ReLU and max pooling 2x2, forward and backward, for training on CPUs. Paper and formulas:
 * batch_norm.py here.
 *
 * Sums run in float within a block of rows (pixels) and in double over the blocks, which are cut by the number of rows
 * alone: the result does not depend on the number of threads.
 */
#ifdef __AVX512BW__
#define LANES 16
#endif
#include "vectors.h"

#define TILE 4 /* vectors of channels that are summed at once */
#define BLOCK 64
#define NOBODY 4 /* the number of a window's winner when the ReLU is closed */

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
                       const int tile, const int lanes) {
    vec s[TILE] = {{0}}, q[TILE] = {{0}}, k[TILE];
    for (int t = 0; t < tile; t++) k[t] = load_some(first + t * LANES, lanes);
    for (int64_t r = 0; r < n; r++)
        for (int t = 0; t < tile; t++) {
            vec v = load_some(x + r * channels + t * LANES, lanes) - k[t];
            s[t] += v;
            q[t] += v * v;
        }
    for (int t = 0; t < tile; t++) {
        store_floats(sum + t * LANES, s[t], lanes);
        store_floats(square + t * LANES, q[t], lanes);
    }
}

/* The norm with x's own mean and variance, which the running ones move towards, as scale * x + shift.
 * saved [4][channels]: scale, shift, mean, 1 / standard deviation. Returns 0, with nothing done, when memory is short. */
static int fit_norm(const real *x, int64_t rows, int64_t channels, const float *weight, const float *bias, float eps,
                    float momentum, float *running_mean, float *running_var, float *saved) {
    int64_t blocks = count_blocks(rows);
    float *scale = saved, *shift = saved + channels, *mean = saved + 2 * channels, *inverse = saved + 3 * channels;
    float *parts = malloc(blocks * 2 * channels * sizeof *parts);
    double *sums = malloc(2 * channels * sizeof *sums);
    int enough = parts && sums;
    if (enough) {
#pragma omp parallel for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const real *from = x + b * BLOCK * channels;
            float *sum = parts + b * 2 * channels, *square = sum + channels;
            int64_t n = min_rows(BLOCK, rows - b * BLOCK), c = 0;
            for (; c + TILE * LANES <= channels; c += TILE * LANES)
                moments_of(from + c, x + c, n, channels, sum + c, square + c, TILE, LANES);
            for (; c + LANES <= channels; c += LANES)
                moments_of(from + c, x + c, n, channels, sum + c, square + c, 1, LANES);
            if (c < channels) moments_of(from + c, x + c, n, channels, sum + c, square + c, 1, 8);
        }
        add_blocks(parts, blocks, channels, sums);
        for (int64_t c = 0; c < channels; c++) {
            float first[8];
            store_floats(first, load_some(x + c / 8 * 8, 8), 8);
            double offset = sums[c] / rows, variance = sums[channels + c] / rows - offset * offset;
            variance = variance < 0 ? 0 : variance; /* NaN stays */
            mean[c] = (float)(first[c % 8] + offset);
            inverse[c] = (float)(1 / sqrt(variance + eps));
            scale[c] = weight[c] * inverse[c];
            shift[c] = bias[c] - mean[c] * scale[c];
            running_mean[c] += momentum * (mean[c] - running_mean[c]);
            running_var[c] += momentum * ((float)(variance * rows / (rows - 1)) - running_var[c]);
        }
    }
    free(parts);
    free(sums);
    return enough;
}

INLINE void norm_relu(const real *x, const float *scale, const float *shift, real *y, const int lanes) {
    vec v = load_some(x, lanes) * load_floats(scale, lanes) + load_floats(shift, lanes);
    store_some(y, choose(v < 0, (vec){0}, v), lanes);
}

/* y = max(0, scale * x + shift); NaN stays NaN. For the rest see fit_norm. */
int batch_norm_relu(const real *x, int64_t rows, int64_t channels, const float *weight, const float *bias, float eps,
                    float momentum, float *running_mean, float *running_var, float *saved, real *y) {
    const float *scale = saved, *shift = saved + channels;
    if (!fit_norm(x, rows, channels, weight, bias, eps, momentum, running_mean, running_var, saved)) return 0;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        int64_t c = 0, at = r * channels;
        for (; c + LANES <= channels; c += LANES) norm_relu(x + at + c, scale + c, shift + c, y + at + c, LANES);
        if (c < channels) norm_relu(x + at + c, scale + c, shift + c, y + at + c, 8);
    }
    return 1;
}

/* Integers in the order of the numbers x, or against it, or all 0. */
INLINE row rank(row x, row down, row equal) { return (x ^ ((x >> SIGN_SHIFT) & ALL_BUT_SIGN) ^ down) & ~equal; }

/* The pixel that wins a window has the greatest x, or the least where the scale is negative, or is the first where it
 * is 0: integers tell. Half a window at the end of an odd side sees its pixels twice. Where one x of a channel is NaN
 * all y are, whichever wins. */
INLINE void pool_window(const real *x, int64_t below, int64_t beside, const float *scale, const float *shift,
                        real *winner, bits *place, real *y, const int lanes) {
    vec a = load_floats(scale, lanes);
    row down = narrow(a < 0), equal = narrow(a == 0), best = load_bits(x, lanes), where = {0};
    row most = rank(best, down, equal);
    for (int q = 1; q < 4; q++) {
        row v = load_bits(x + q / 2 * below + q % 2 * beside, lanes), r = rank(v, down, equal), better = r > most;
        most = choose_bits(better, r, most);
        best = choose_bits(better, v, best);
        where = choose_bits(better, (row){0} + (bits)q, where);
    }
    vec v = widen(best) * a + load_floats(shift, lanes);
    ivec closed = v <= 0;
    store_bits(winner, best, lanes);
    store_bits(place, choose_bits(narrow(closed), (row){0} + NOBODY, where), lanes);
    store_some(y, choose(closed, (vec){0}, v), lanes);
}

/* y = the greatest of each window's four max(0, scale * x + shift) [images][out_height][out_width][channels]; winner
 * and place: the x it was made of, and the number of its pixel. For the rest see fit_norm. */
int batch_norm_relu_pool(const real *x, int64_t images, int64_t height, int64_t width, int64_t channels,
                         int64_t out_height, int64_t out_width, const float *weight, const float *bias, float eps,
                         float momentum, float *running_mean, float *running_var, float *saved, real *winner,
                         bits *place, real *y) {
    const float *scale = saved, *shift = saved + channels;
    int64_t rows = images * height * width;
    if (!fit_norm(x, rows, channels, weight, bias, eps, momentum, running_mean, running_var, saved)) return 0;
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < images * out_height; line++) {
        int64_t image = line / out_height, h = line % out_height * 2;
        int64_t below = h + 1 < height ? width * channels : 0;
        for (int64_t column = 0; column < out_width; column++) {
            const real *from = x + ((image * height + h) * width + column * 2) * channels;
            int64_t beside = column * 2 + 1 < width ? channels : 0, out = (line * out_width + column) * channels, c = 0;
            for (; c + LANES <= channels; c += LANES)
                pool_window(from + c, below, beside, scale + c, shift + c, winner + out + c, place + out + c,
                            y + out + c, LANES);
            if (c < channels)
                pool_window(from + c, below, beside, scale + c, shift + c, winner + out + c, place + out + c,
                            y + out + c, 8);
        }
    }
    return 1;
}

/* The gradient behind the ReLU: grad where it was open. */
INLINE vec behind_relu(vec x, vec scale, vec shift, vec grad) { return choose(x * scale + shift <= 0, (vec){0}, grad); }

INLINE void grad_sums_of(const real *x, const real *grad, int64_t n, int64_t channels, int64_t stride,
                         const float *scale, const float *shift, const float *mean, float *sum, float *product,
                         const int tile, const int lanes) {
    vec s[TILE] = {{0}}, q[TILE] = {{0}};
    for (int64_t r = 0; r < n; r++)
        for (int t = 0; t < tile; t++) {
            int64_t c = t * LANES;
            vec v = load_some(x + r * channels + c, lanes), a = load_floats(scale + c, lanes);
            vec g = behind_relu(v, a, load_floats(shift + c, lanes), load_some(grad + r * stride + c, lanes));
            s[t] += g;
            q[t] += g * (v - load_floats(mean + c, lanes));
        }
    for (int t = 0; t < tile; t++) {
        store_floats(sum + t * LANES, s[t], lanes);
        store_floats(product + t * LANES, q[t], lanes);
    }
}

/* With g behind the ReLU and x' = (x - mean) / sd: dbias = sum g, dweight = sum g x' over the `rows` whose y get a
 * gradient, which lie `stride` values apart. coefficients [2][channels]: s and o of dx = scale g + s x + o, which is
 * weight / sd * (g - dbias / pixels - x' dweight / pixels). Returns 0, with nothing done, when memory is short. */
static int sum_grads(const real *x, const real *grad, int64_t rows, int64_t pixels, int64_t channels, int64_t stride,
                     const float *saved, float *coefficients, float *dweight, float *dbias) {
    int64_t blocks = count_blocks(rows);
    const float *scale = saved, *shift = saved + channels, *mean = saved + 2 * channels, *inverse = saved + 3 * channels;
    float *parts = malloc(blocks * 2 * channels * sizeof *parts), *slope = coefficients, *offset = slope + channels;
    double *sums = malloc(2 * channels * sizeof *sums);
    int enough = parts && sums;
    if (enough) {
#pragma omp parallel for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const real *from = x + b * BLOCK * channels, *grads = grad + b * BLOCK * stride;
            float *sum = parts + b * 2 * channels, *product = sum + channels;
            int64_t n = min_rows(BLOCK, rows - b * BLOCK), c = 0;
            for (; c + TILE * LANES <= channels; c += TILE * LANES)
                grad_sums_of(from + c, grads + c, n, channels, stride, scale + c, shift + c, mean + c, sum + c,
                             product + c, TILE, LANES);
            for (; c + LANES <= channels; c += LANES)
                grad_sums_of(from + c, grads + c, n, channels, stride, scale + c, shift + c, mean + c, sum + c,
                             product + c, 1, LANES);
            if (c < channels)
                grad_sums_of(from + c, grads + c, n, channels, stride, scale + c, shift + c, mean + c, sum + c,
                             product + c, 1, 8);
        }
        add_blocks(parts, blocks, channels, sums);
        for (int64_t c = 0; c < channels; c++) {
            dbias[c] = (float)sums[c];
            dweight[c] = (float)(sums[channels + c] * inverse[c]);
            slope[c] = -scale[c] * inverse[c] * dweight[c] / pixels;
            offset[c] = -scale[c] * dbias[c] / pixels - slope[c] * mean[c];
        }
    }
    free(parts);
    free(sums);
    return enough;
}

INLINE void norm_relu_grad(const real *x, const real *grad, const float *scale, const float *shift, const float *slope,
                           const float *offset, real *dx, const int lanes) {
    vec v = load_some(x, lanes), a = load_floats(scale, lanes);
    vec g = behind_relu(v, a, load_floats(shift, lanes), load_some(grad, lanes));
    store_some(dx, a * g + load_floats(slope, lanes) * v + load_floats(offset, lanes), lanes);
}

/* Gradients of batch_norm_relu. Returns 0, with nothing done, when memory is short. For the rest see sum_grads. */
int batch_norm_relu_grad(const real *x, const real *grad, int64_t rows, int64_t channels, int64_t stride,
                         const float *saved, real *dx, float *dweight, float *dbias) {
    const float *scale = saved, *shift = saved + channels;
    float *slope = malloc(2 * channels * sizeof *slope), *offset = slope + channels;
    int enough = slope && sum_grads(x, grad, rows, rows, channels, stride, saved, slope, dweight, dbias);
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < (enough ? rows : 0); r++) {
        const real *from = x + r * channels, *grads = grad + r * stride;
        real *to = dx + r * channels;
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES)
            norm_relu_grad(from + c, grads + c, scale + c, shift + c, slope + c, offset + c, to + c, LANES);
        if (c < channels) norm_relu_grad(from + c, grads + c, scale + c, shift + c, slope + c, offset + c, to + c, 8);
    }
    free(slope);
    return enough;
}

/* dx of a window's `lines` times `columns` pixels, of which `place` says who gets the gradient. */
INLINE void spread_grad(const real *x, row grad, row place, int64_t lines, int64_t columns, int64_t line,
                        int64_t column, const float *scale, const float *slope, const float *offset, real *dx,
                        const int lanes) {
    vec a = load_floats(scale, lanes), s = load_floats(slope, lanes), o = load_floats(offset, lanes);
    for (int64_t i = 0; i < lines; i++)
        for (int64_t j = 0; j < columns; j++) {
            int64_t at = i * line + j * column;
            vec g = widen(grad & (place == (bits)(2 * i + j)));
            store_some(dx + at, a * g + s * load_some(x + at, lanes) + o, lanes);
        }
}

/* Gradients of batch_norm_relu_pool: the sums need the winners alone. For the rest see sum_grads. */
int batch_norm_relu_pool_grad(const real *x, const real *winner, const bits *place, const real *grad, int64_t images,
                              int64_t height, int64_t width, int64_t channels, int64_t out_height, int64_t out_width,
                              int64_t stride, const float *saved, real *dx, float *dweight, float *dbias) {
    const float *scale = saved;
    float *slope = malloc(2 * channels * sizeof *slope), *offset = slope + channels;
    int64_t rows = images * out_height * out_width, pixels = images * height * width, half = (height + 1) / 2;
    int enough = slope && sum_grads(winner, grad, rows, pixels, channels, stride, saved, slope, dweight, dbias);
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < (enough ? images * half : 0); line++) {
        int64_t image = line / half, h = line % half, lines = min_rows(2, height - 2 * h);
        for (int64_t w = 0; 2 * w < width; w++) {
            int64_t in = ((image * height + 2 * h) * width + 2 * w) * channels, columns = min_rows(2, width - 2 * w);
            int64_t out = (image * out_height + h) * out_width + w, c = 0;
            int pooled = h < out_height && w < out_width; /* or left over at the end of an odd side */
            for (; c + LANES <= channels; c += LANES) {
                row g = pooled ? load_bits(grad + out * stride + c, LANES) : (row){0};
                row p = pooled ? load_bits(place + out * channels + c, LANES) : (row){0};
                spread_grad(x + in + c, g, p, lines, columns, width * channels, channels, scale + c, slope + c,
                            offset + c, dx + in + c, LANES);
            }
            if (c < channels) {
                row g = pooled ? load_bits(grad + out * stride + c, 8) : (row){0};
                row p = pooled ? load_bits(place + out * channels + c, 8) : (row){0};
                spread_grad(x + in + c, g, p, lines, columns, width * channels, channels, scale + c, slope + c,
                            offset + c, dx + in + c, 8);
            }
        }
    }
    free(slope);
    return enough;
}
