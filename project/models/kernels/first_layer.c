/* Convolution 3x3 of images, batch norm, ReLU and max pooling 2x2 in one pass. The paper and the formulas are in
 * first_layer.py in this folder.
 *
 * The images are copied once, with a border around them. The taps of a pixel are then nine numbers of the copy for each
 * input channel. A number near the mean of each channel is subtracted in the copy. It does not change the result,
 * because batch norm removes every constant, and it makes the sums more precise.
 *
 * Moments are summed up in double, because a variance may be a small difference of large products of neighbouring
 * pixels. The sums of the gradient run in float within an image. The number of images in a block is constant, so the
 * result does not depend on the number of threads.
 */
#include "vectors.h"

#define SIDE 3
#define TAPS (SIDE * SIDE)
#define MAX_TAPS (3 * TAPS)
#define BLOCK 8 /* images of a block */
#define NOBODY 4 /* the place of a window's winner if the ReLU is closed, that is, if its output is 0 */

typedef double dvec __attribute__((vector_size(32)));
#define DLANES 4

INLINE vec fill(float x) { return (vec){x, x, x, x, x, x, x, x}; }

typedef struct {
    int64_t images, in_channels, height, width, channels, out_height, out_width;
    int64_t window; /* side of the pooling's window: 2, or 1 without pooling */
} layer;

/* A plane of the copy holds one channel of an image, with a border of one pixel. Its sides are even, so that every
 * window of two lines and two columns is whole. */
INLINE int64_t padded_line(const layer *l) { return (l->width + 1) / 2 * 2 + 2; }
INLINE int64_t padded_plane(const layer *l) { return ((l->height + 1) / 2 * 2 + 2) * padded_line(l); }

INLINE int64_t count_taps(const layer *l) { return l->in_channels * TAPS; }
INLINE int64_t count_blocks(const layer *l) { return (l->images + BLOCK - 1) / BLOCK; }
INLINE int64_t last_image(const layer *l, int64_t block) {
    return (block + 1) * BLOCK < l->images ? (block + 1) * BLOCK : l->images;
}

/* Add up the sums of all blocks, in the order of the blocks: [blocks][count] -> [count]. */
static void add_blocks(const double *parts, int64_t blocks, int64_t count, double *sums) {
    memset(sums, 0, count * sizeof *sums);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = 0; i < count; i++) sums[i] += parts[b * count + i];
}

/* The mean of one channel of an image. strides: the distances of images, channels, lines and columns, in values. */
static float mean_of(const float *x, const layer *l, const int64_t *strides) {
    double sum = 0;
    for (int64_t h = 0; h < l->height; h++)
        for (int64_t w = 0; w < l->width; w++) sum += x[h * strides[2] + w * strides[3]];
    return (float)(sum / (l->height * l->width));
}

/* Copy one image into the middle of its planes, and subtract the mean of each channel. The border is the convolution's
 * padding: 0, minus the mean. */
static void pad_image(const float *x, const layer *l, const int64_t *strides, const float *means, float *padded) {
    int64_t length = padded_line(l), lines = padded_plane(l) / length;
    for (int64_t c = 0; c < l->in_channels; c++)
        for (int64_t h = 0; h < lines; h++) {
            const float *from = x + c * strides[1] + (h - 1) * strides[2];
            float *to = padded + (c * lines + h) * length;
            for (int64_t w = 0; w < length; w++) to[w] = -means[c];
            if (h > 0 && h <= l->height)
                for (int64_t w = 0; w < l->width; w++) to[w + 1] = from[w * strides[3]] - means[c];
        }
}

INLINE int64_t shifted_line(const layer *l) { return (l->width + DLANES - 1) / DLANES * DLANES; }

/* Make three copies of an image's planes in double, shifted by 0, 1 and 2 columns. Their lines are filled with zeros to
 * whole vectors. Tap (line i, column j) of all pixels is then copy j from line i on, without gaps. So a sum of products
 * of two taps is a plain dot product. */
static void shift_image(const float *padded, const layer *l, double *shifted) {
    int64_t length = padded_line(l), lines = l->height + 2, to_length = shifted_line(l);
    for (int64_t c = 0; c < l->in_channels; c++)
        for (int64_t j = 0; j < SIDE; j++)
            for (int64_t h = 0; h < lines; h++) {
                double *to = shifted + ((c * SIDE + j) * lines + h) * to_length;
                for (int64_t w = 0; w < to_length; w++)
                    to[w] = w < l->width ? padded[c * padded_plane(l) + h * length + w + j] : 0;
            }
}

INLINE double total(dvec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

/* Add the products of three taps of one line with three taps of another line, each summed over the image. The 9 sums
 * stay in registers. */
INLINE void add_products(const double *a, const double *b, int64_t count, int64_t stride, int64_t taps, double *sums) {
    dvec s[SIDE][SIDE] = {{{0}}};
    for (int64_t i = 0; i < count; i += DLANES) {
        dvec u[SIDE], v[SIDE];
        for (int j = 0; j < SIDE; j++) {
            memcpy(&u[j], a + j * stride + i, sizeof u[j]);
            memcpy(&v[j], b + j * stride + i, sizeof v[j]);
        }
        for (int j = 0; j < SIDE; j++)
            for (int k = 0; k < SIDE; k++) s[j][k] += u[j] * v[k];
    }
    for (int j = 0; j < SIDE; j++)
        for (int k = 0; k < SIDE; k++) sums[j * taps + k] += total(s[j][k]);
}

/* Add the sums of an image to `sums`: the sums of each tap, [taps], and of the products of two taps, [taps][taps]. The
 * matrix is symmetric, so only the products of which the first line is not after the second are computed. */
static void add_moments(const double *shifted, const layer *l, double *sums) {
    int64_t taps = count_taps(l), length = shifted_line(l);
    int64_t stride = (l->height + 2) * length, count = l->height * length;
    for (int64_t a = 0; a < l->in_channels * SIDE; a++) { /* three taps of one line of one channel */
        const double *x = shifted + a / SIDE * SIDE * stride + a % SIDE * length;
        for (int64_t j = 0; j < SIDE; j++) {
            dvec s = {0};
            for (int64_t i = 0; i < count; i += DLANES) {
                dvec v;
                memcpy(&v, x + j * stride + i, sizeof v);
                s += v;
            }
            sums[a * SIDE + j] += total(s);
        }
        for (int64_t b = a; b < l->in_channels * SIDE; b++)
            add_products(x, shifted + b / SIDE * SIDE * stride + b % SIDE * length, count, stride, taps,
                         sums + taps + a * SIDE * taps + b * SIDE);
    }
}

/* Turn the sums over all pixels into the mean [taps] and the covariance [taps][taps], in place. */
static void finish_moments(double *moments, int64_t taps, double pixels) {
    double *mean = moments, *covariance = moments + taps;
    for (int64_t a = 0; a < taps; a++) mean[a] /= pixels;
    for (int64_t a = 0; a < taps; a++)
        for (int64_t b = a; b < taps; b++) {
            double value = covariance[a * taps + b] / pixels - mean[a] * mean[b];
            covariance[a * taps + b] = covariance[b * taps + a] = value;
        }
}

INLINE double dot(const float *weight, const double *v, int64_t taps) {
    double sum = 0;
    for (int64_t t = 0; t < taps; t++) sum += weight[t] * v[t];
    return sum;
}

/* The variance w.S w of a channel's output, before the norm. */
INLINE double variance_of(const float *weight, const double *covariance, int64_t taps) {
    double sum = 0;
    for (int64_t t = 0; t < taps; t++) sum += weight[t] * dot(weight, covariance + t * taps, taps);
    return sum < 0 ? 0 : sum; /* rounding may give less than 0; NaN stays NaN */
}

/* Fold the batch norm into the convolution. folded: the weights times the scale, [taps][channels], and behind them the
 * shift, [channels]. The running statistics are updated. means: the number that was subtracted from each input channel;
 * the running mean contains it again. */
static void fold_norm(const layer *l, const float *weight, const double *moments, const float *means,
                      const float *gamma, const float *beta, float eps, float momentum, float *running_mean,
                      float *running_var, float *inverse, float *folded) {
    int64_t taps = count_taps(l), channels = l->channels;
    double pixels = (double)(l->images * l->height * l->width);
    for (int64_t c = 0; c < channels; c++) {
        const float *w = weight + c * taps;
        double mean = dot(w, moments, taps), variance = variance_of(w, moments + taps, taps), scale;
        inverse[c] = (float)(1 / sqrt(variance + eps));
        scale = (double)gamma[c] * inverse[c];
        folded[taps * channels + c] = (float)(beta[c] - mean * scale);
        for (int64_t t = 0; t < taps; t++) {
            folded[t * channels + c] = (float)(w[t] * scale);
            mean += (double)w[t] * means[t / TAPS];
        }
        running_mean[c] += momentum * ((float)mean - running_mean[c]);
        running_var[c] += momentum * ((float)(variance * pixels / (pixels - 1)) - running_var[c]);
    }
}

/* Convolution, ReLU and max pooling of one image, for eight output channels.
 *
 * y: the greatest max(0, weight * taps + shift) of each window. place: the number of the pixel that has it, the first
 * of equals, or NOBODY. At the end of an odd side only half of the window is inside the map; `below` or `beside` is
 * then 0, and the pixels are seen twice. If one value of a channel is NaN, mean and variance make all values NaN, and
 * the first pixel of each window wins. */
INLINE void convolve(const float *padded, const layer *l, const float *weight, const float *shift, real *y, bits *place,
                     const int64_t in_channels, const int side) {
    int64_t length = padded_line(l), plane = padded_plane(l), channels = l->channels;
    int64_t height = l->height, width = l->width, out_height = l->out_height, out_width = l->out_width;
    vec filter[MAX_TAPS], start = load_float(shift);
    for (int k = 0; k < in_channels * TAPS; k++) filter[k] = load_float(weight + k * channels);
    for (int64_t h = 0; h < out_height; h++)
        for (int64_t w = 0; w < out_width; w++) {
            const float *from = padded + h * side * length + w * side;
            int64_t below = h * 2 + 1 < height ? length : 0, beside = w * 2 + 1 < width;
            vec sums[SIDE][4]; /* one sum for each line of taps: the additions of one sum would wait for each other */
            for (int q = 0; q < side * side; q++) sums[0][q] = start, sums[1][q] = sums[2][q] = (vec){0};
            for (int c = 0; c < in_channels; c++)
                for (int i = 0; i < SIDE; i++)
                    for (int j = 0; j < SIDE; j++)
                        for (int q = 0; q < side * side; q++)
                            sums[i][q] += filter[(c * SIDE + i) * SIDE + j] *
                                          from[c * plane + i * length + j + q / 2 * below + q % 2 * beside];
            for (int q = 0; q < side * side; q++) sums[0][q] += sums[1][q] + sums[2][q];
            vec best = sums[0][0];
            ivec where = {0};
            for (int q = 1; q < side * side; q++) {
                ivec better = sums[0][q] > best;
                best = choose(better, sums[0][q], best);
                where = (better & q) | (where & ~better);
            }
            ivec closed = best <= 0;
            int64_t out = (h * out_width + w) * channels;
            store(y + out, choose(closed, (vec){0}, best));
            store_row(place + out, __builtin_convertvector((closed & NOBODY) | (where & ~closed), row));
        }
}

static void convolve_image(const float *padded, const layer *l, const float *weight, const float *shift, real *y,
                           bits *place) {
    for (int64_t k = 0; k < l->channels; k += LANES)
        if (l->in_channels == 1 && l->window == 2) /* constant arguments: the nine weights stay in registers */
            convolve(padded, l, weight + k, shift + k, y + k, place + k, 1, 2);
        else if (l->window == 2)
            convolve(padded, l, weight + k, shift + k, y + k, place + k, l->in_channels, 2);
        else
            convolve(padded, l, weight + k, shift + k, y + k, place + k, l->in_channels, 1);
}

/* The whole layer. y and place: [images][out_height][out_width][channels]. The running statistics are updated.
 * strides: the distances of images, channels, lines and columns of x, in values. For the gradient: padded, the copy of
 * the images; moments [taps + taps * taps], mean and covariance; inverse [channels], 1 / standard deviation. Returns 0,
 * with nothing done, if there is no memory. */
int first_layer(const float *x, int64_t images, int64_t in_channels, int64_t height, int64_t width, int64_t channels,
                int64_t out_height, int64_t out_width, int64_t window, const int64_t *strides, const float *weight,
                const float *gamma, const float *beta, float eps, float momentum, float *running_mean,
                float *running_var, float *padded, double *moments, float *inverse, real *y, bits *place) {
    const layer l = {images, in_channels, height, width, channels, out_height, out_width, window};
    int64_t taps = count_taps(&l), blocks = count_blocks(&l), size = in_channels * padded_plane(&l);
    int64_t shifted_size = in_channels * SIDE * (height + 2) * shifted_line(&l), num_moments = taps + taps * taps;
    int64_t out_size = out_height * out_width * channels;
    double *parts = calloc(blocks * num_moments, sizeof *parts);
    double *shifted = malloc(blocks * shifted_size * sizeof *shifted);
    float *folded = malloc((taps + 1) * channels * sizeof *folded), *means = malloc(in_channels * sizeof *means);
    int enough = parts && shifted && folded && means;
    if (enough) {
        /* The mean over the first image is near enough to that of all. */
        for (int64_t c = 0; c < in_channels; c++) means[c] = mean_of(x + c * strides[1], &l, strides);
#pragma omp parallel for schedule(static)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t n = b * BLOCK; n < last_image(&l, b); n++) {
                pad_image(x + n * strides[0], &l, strides, means, padded + n * size);
                shift_image(padded + n * size, &l, shifted + b * shifted_size);
                add_moments(shifted + b * shifted_size, &l, parts + b * num_moments);
            }
        add_blocks(parts, blocks, num_moments, moments);
        finish_moments(moments, taps, (double)(images * height * width));
        fold_norm(&l, weight, moments, means, gamma, beta, eps, momentum, running_mean, running_var, inverse, folded);
#pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < images; n++)
            convolve_image(padded + n * size, &l, folded, folded + taps * channels, y + n * out_size,
                           place + n * out_size);
    }
    free(parts);
    free(shifted);
    free(folded);
    free(means);
    return enough;
}

/* A mask of all ones where a bit of `number` is 1. `number` comes from `widen`; if a `bits` is half an int, it is in the
 * upper half of the int. */
INLINE ivec all_bits(ivec number, int bit) { return number << (8 * (int)sizeof(bits) - 1 - bit) >> 31; }

/* Add the sums of an image, for eight output channels and one input channel: the sum of g, and products
 * [TAPS][channels], the sums of g times each tap of the pixel that won. g is 0 if the ReLU was closed. */
INLINE void add_grads(const float *padded, const layer *l, const real *grad, int64_t stride, const bits *place,
                      double *sums, double *products, const int pooled) {
    int64_t length = padded_line(l);
    vec sum = {0}, product[SIDE][SIDE] = {{{0}}};
    for (int64_t h = 0; h < l->out_height; h++)
        for (int64_t w = 0; w < l->out_width; w++) {
            const float *from = padded + h * l->window * length + w * l->window;
            int64_t out = h * l->out_width + w;
            ivec where = (ivec)widen(load_row(place + out * l->channels));
            /* The place is 0 or 1 in the upper line, 2 or 3 in the lower line, or NOBODY = 4. */
            ivec right = all_bits(where, 0), lower = all_bits(where, 1), closed = all_bits(where, 2);
            vec g = (vec)((ivec)load(grad + out * stride) & ~closed);
            sum += g;
            for (int j = 0; j < SIDE; j++) {
                vec seen[SIDE + 1]; /* column j of the taps in the winner's column, for both lines that it may be in */
                for (int i = 0; i < SIDE + pooled; i++) {
                    seen[i] = fill(from[i * length + j]);
                    if (pooled) seen[i] = choose(right, fill(from[i * length + j + 1]), seen[i]);
                }
                for (int i = 0; i < SIDE; i++)
                    product[i][j] += g * (pooled ? choose(lower, seen[i + 1], seen[i]) : seen[i]);
            }
        }
    for (int c = 0; c < LANES; c++) {
        if (sums) sums[c] += sum[c];
        for (int k = 0; k < TAPS; k++) products[k * l->channels + c] += product[k / SIDE][k % SIDE][c];
    }
}

static void add_image_grads(const float *padded, const layer *l, const real *grad, int64_t stride, const bits *place,
                            double *sums) {
    for (int64_t c = 0; c < l->in_channels; c++)
        for (int64_t k = 0; k < l->channels; k += LANES) {
            const float *plane = padded + c * padded_plane(l);
            double *sum = c ? NULL : sums + k, *products = sums + (1 + c * TAPS) * l->channels + k;
            if (l->window == 2)
                add_grads(plane, l, grad + k, stride, place + k, sum, products, 1);
            else
                add_grads(plane, l, grad + k, stride, place + k, sum, products, 0);
        }
}

/* Gradients of weight, gamma and beta, from the gradient of y, whose pixels are `stride` values apart. The formulas of
 * the last loop are in first_layer.py. Returns 0, with nothing done, if there is no memory. */
int first_layer_grad(const float *padded, int64_t images, int64_t in_channels, int64_t height, int64_t width,
                     int64_t channels, int64_t out_height, int64_t out_width, int64_t window, const real *grad,
                     int64_t stride, const bits *place, const float *weight, const float *gamma,
                     const double *moments, const float *inverse, float *dweight, float *dgamma, float *dbeta) {
    const layer l = {images, in_channels, height, width, channels, out_height, out_width, window};
    int64_t taps = count_taps(&l), blocks = count_blocks(&l), size = in_channels * padded_plane(&l);
    int64_t out_pixels = out_height * out_width, count = (1 + taps) * channels;
    const double *covariance = moments + taps;
    double *parts = calloc(blocks * count, sizeof *parts), *sums = malloc(count * sizeof *sums);
    int enough = parts && sums;
    if (enough) {
#pragma omp parallel for schedule(static)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t n = b * BLOCK; n < last_image(&l, b); n++)
                add_image_grads(padded + n * size, &l, grad + n * out_pixels * stride, stride,
                                place + n * out_pixels * channels, parts + b * count);
        add_blocks(parts, blocks, count, sums);
        for (int64_t c = 0; c < channels; c++) {
            const float *w = weight + c * taps;
            double products = 0, slope; /* products: w.G; the loop turns sum g p into G = sum g (p - m) */
            for (int64_t t = 0; t < taps; t++)
                products += w[t] * (sums[(1 + t) * channels + c] -= sums[c] * moments[t]);
            dbeta[c] = (float)sums[c];
            dgamma[c] = (float)(products * inverse[c]);
            slope = products * inverse[c] * inverse[c];
            for (int64_t t = 0; t < taps; t++)
                dweight[c * taps + t] = (float)((double)gamma[c] * inverse[c] * (sums[(1 + t) * channels + c] -
                                                slope * dot(w, covariance + t * taps, taps)));
        }
    }
    free(parts);
    free(sums);
    return enough;
}
