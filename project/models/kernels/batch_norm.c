/* Batch norm with ReLU and max pooling 2x2, forward and backward, for training on CPUs. The paper and the formulas are
 * in batch_norm.py in this folder.
 *
 * A map is a matrix of rows (pixels) and channels. Sums over the rows run in float within a block of rows, and in
 * double over the blocks. The size of a block is constant, so the result does not depend on the number of threads.
 *
 * Each loop over channels has up to three parts: TILE vectors at a time, then one vector at a time, then the last eight
 * channels.
 */
#ifdef __AVX512BW__
#define LANES 16
#endif
#include "vectors.h"

#define TILE 4 /* vectors of channels that are summed at once */
#define BLOCK 64 /* rows of a block */
#define NOBODY 4 /* the place of a window's winner if the ReLU is closed, that is, if its output is 0 */

static int64_t count_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }
static int64_t min_rows(int64_t a, int64_t b) { return a < b ? a : b; }

/* Add up the two sums per channel of all blocks, in the order of the blocks: [blocks][2][channels] -> [2][channels]. */
static void add_blocks(const float *parts, int64_t blocks, int64_t channels, double *sums) {
    memset(sums, 0, 2 * channels * sizeof *sums);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < 2 * channels; c++) sums[c] += parts[b * 2 * channels + c];
}

/* Sums of x - first and of (x - first)^2 over n rows. `first` is one pixel of the map, near the mean. The variance is a
 * difference of squares, and the shift by `first` makes this difference precise. */
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

/* Fit the norm to the map x: batch norm becomes scale * x + shift. The running mean and variance move towards those of
 * x.
 *
 * saved [4][channels]: scale, shift, mean, 1 / standard deviation. Returns 0, with nothing done, if there is no memory.
 */
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
            float first[8]; /* the same pixel of x that moments_of subtracted, as floats */
            store_floats(first, load_some(x + c / 8 * 8, 8), 8);
            double offset = sums[c] / rows, variance = sums[channels + c] / rows - offset * offset;
            variance = variance < 0 ? 0 : variance; /* rounding may give less than 0; NaN stays NaN */
            mean[c] = (float)(first[c % 8] + offset);
            inverse[c] = (float)(1 / sqrt(variance + eps));
            scale[c] = weight[c] * inverse[c];
            shift[c] = bias[c] - mean[c] * scale[c];
            running_mean[c] += momentum * (mean[c] - running_mean[c]);
            running_var[c] += momentum * ((float)(variance * rows / (rows - 1)) - running_var[c]); /* unbiased */
        }
    }
    free(parts);
    free(sums);
    return enough;
}

/* One vector of max(0, scale * x + shift). */
INLINE void norm_relu(const real *x, const float *scale, const float *shift, real *y, const int lanes) {
    vec v = load_some(x, lanes) * load_floats(scale, lanes) + load_floats(shift, lanes);
    store_some(y, choose(v < 0, (vec){0}, v), lanes);
}

/* y = max(0, scale * x + shift); NaN stays NaN. The other arguments and the result are those of fit_norm. */
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

/* Integers that have the order of the numbers x; the opposite order where `down` is all ones; 0 where `equal` is.
 *
 * The bits of a positive float, read as an integer, have the order of the numbers. Those of a negative float have the
 * opposite order, so all bits but the sign are inverted. */
INLINE row rank(row x, row down, row equal) { return (x ^ ((x >> SIGN_SHIFT) & ALL_BUT_SIGN) ^ down) & ~equal; }

/* Norm, ReLU and max pooling of one window, for one vector of channels.
 *
 * The winner of the window is the pixel with the greatest scale * x + shift: the one with the greatest x, or with the
 * least x if the scale is negative, or the first pixel if the scale is 0. Integers are compared (see rank), so nothing
 * is rounded. At the end of an odd side only half of the window is inside the map; `below` or `beside` is then 0, and
 * the pixels are seen twice. If one x of a channel is NaN, its mean is NaN and so are all y, whatever pixel wins. */
INLINE void pool_window(const real *x, int64_t below, int64_t beside, const float *scale, const float *shift,
                        real *winner, bits *place, real *y, const int lanes) {
    vec a = load_floats(scale, lanes);
    row down = narrow(a < 0), equal = narrow(a == 0), best = load_bits(x, lanes), where = {0};
    row most = rank(best, down, equal);
    for (int q = 1; q < 4; q++) { /* pixel q of the window: q / 2 is its line, q % 2 its column */
        row v = load_bits(x + q / 2 * below + q % 2 * beside, lanes), r = rank(v, down, equal), better = r > most;
        most = choose_bits(better, r, most);
        best = choose_bits(better, v, best);
        where = choose_bits(better, (row){0} + (bits)q, where);
    }
    vec v = widen(best) * a + load_floats(shift, lanes);
    ivec closed = v <= 0; /* false for NaN */
    store_bits(winner, best, lanes);
    store_bits(place, choose_bits(narrow(closed), (row){0} + NOBODY, where), lanes);
    store_some(y, choose(closed, (vec){0}, v), lanes);
}

/* y [images][out_height][out_width][channels]: the greatest of the four max(0, scale * x + shift) of each window.
 * winner and place, of the same shape: the x of the winning pixel, and its place in the window, 0 to 3 or NOBODY. The
 * other arguments and the result are those of fit_norm. */
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

/* The gradient of the ReLU's input: grad where the output was above 0, else 0. */
INLINE vec behind_relu(vec x, vec scale, vec shift, vec grad) { return choose(x * scale + shift <= 0, (vec){0}, grad); }

/* Sums of g and of g * (x - mean) over n rows, where g is the gradient of the ReLU's input. */
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

/* Gradients of weight and bias, and what dx needs of the sums.
 *
 * Let g be the gradient of the ReLU's input, sd the standard deviation and x' = (x - mean) / sd. Then
 *
 *     dbias   = sum g
 *     dweight = sum g x'
 *     dx      = weight / sd * (g - dbias / pixels - x' dweight / pixels)  =  scale g + s x + o.
 *
 * The sums run over `rows` rows of x and grad, which are all rows whose g may differ from 0. Rows of grad are `stride`
 * values apart. `pixels` is the number of all rows of the map.
 *
 * coefficients [2][channels]: s and o. Returns 0, with nothing done, if there is no memory. */
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

/* One vector of dx = scale g + slope x + offset. */
INLINE void norm_relu_grad(const real *x, const real *grad, const float *scale, const float *shift, const float *slope,
                           const float *offset, real *dx, const int lanes) {
    vec v = load_some(x, lanes), a = load_floats(scale, lanes);
    vec g = behind_relu(v, a, load_floats(shift, lanes), load_some(grad, lanes));
    store_some(dx, a * g + load_floats(slope, lanes) * v + load_floats(offset, lanes), lanes);
}

/* Gradients of batch_norm_relu: dx, dweight and dbias. Rows of grad are `stride` values apart. Returns 0, with nothing
 * done, if there is no memory. */
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

/* dx of one window of `lines` times `columns` pixels, for one vector of channels. The pixel with the number `place` has
 * g = grad, all others have g = 0. */
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

/* Gradients of batch_norm_relu_pool: dx, dweight and dbias. The sums need only the winners, as g is 0 at all other
 * pixels. Where the ReLU is closed, sum_grads finds it by the winner's value. Rows of grad are `stride` values apart.
 * Returns 0, with nothing done, if there is no memory. */
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
            int pooled = h < out_height && w < out_width; /* else the pixels are at the end of an odd side, unpooled */
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
