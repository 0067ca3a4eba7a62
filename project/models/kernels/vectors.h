/* Maps and vectors, which all kernels use.
 *
 * The C files are compiled once for each type of the maps: for float, and with -DBFLOAT16 for bfloat16. Maps are
 * channels-last: a list of pixels (images, lines and columns together) of `channels` values each, a multiple of 8.
 *
 * Vectors are the vector extension of GCC and Clang. They have LANES lanes: eight, or the number that a file defines
 * before it includes this one. With sixteen lanes, the last vector of a pixel may be half full. The argument `lanes`,
 * sixteen or eight, says how many lanes are used.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* Half vectors are loaded and stored by shuffles, because GCC compiles other ways to code that goes through memory. */
#if LANES == 8
#define HALF 0, 1, 2, 3
#define REST 4, 5, 6, 7
#else
#define HALF 0, 1, 2, 3, 4, 5, 6, 7
#define REST 8, 9, 10, 11, 12, 13, 14, 15
#endif
#define SHUFFLE __builtin_shufflevector
typedef float half_vec __attribute__((vector_size(2 * LANES)));
INLINE vec load_floats(const float *p, const int lanes) {
    vec v;
    half_vec h;
    memcpy(&h, p, sizeof h);
    if (lanes < LANES) return SHUFFLE(h, (half_vec){0}, HALF, REST);
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_floats(float *p, vec v, const int lanes) {
    half_vec h = SHUFFLE(v, v, HALF);
    if (lanes < LANES)
        memcpy(p, &h, sizeof h);
    else
        memcpy(p, &v, sizeof v);
}
/* `yes` where the mask is all ones, `no` where it is 0. */
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* real: the type of a value of a map. bits: an integer type of the same size. row: a vector of bits.
 * widen: the values of a row as floats. narrow: a vector of int32 as a row; their values must fit into `bits`.
 * to_bits: floats as a row of values, rounded to nearest, ties to even.
 *
 * A bfloat16 value is the upper half of a float. So widen puts zeros below it, and to_bits takes the upper half. */
#ifdef BFLOAT16
typedef uint16_t real;
typedef int16_t bits;
typedef bits row __attribute__((vector_size(2 * LANES)));
typedef bits halves __attribute__((vector_size(4 * LANES)));
#define INFINITE 0x7f80
#if LANES == 8
INLINE halves spread(row z, row h) { return SHUFFLE(z, h, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15); }
#define EVERY_SECOND(v, i) SHUFFLE(v, v, i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14)
#else
INLINE halves spread(row z, row h) {
    return SHUFFLE(z, h, 0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0,
                   29, 0, 30, 0, 31);
}
#define EVERY_SECOND(v, i) \
    SHUFFLE(v, v, i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, i + 24, \
            i + 26, i + 28, i + 30)
#endif
INLINE vec widen(row h) { return (vec)spread((row){0}, h); }
INLINE row narrow(ivec v) { return EVERY_SECOND((halves)v, 0); }
INLINE row to_bits(vec v) {
    ivec u = (ivec)v;
    return EVERY_SECOND((halves)(u + 0x7fff + ((u >> 16) & 1)), 1);
}
#else
typedef float real;
typedef int32_t bits;
typedef ivec row;
#define INFINITE 0x7f800000
INLINE vec widen(row h) { return (vec)h; }
INLINE row narrow(ivec v) { return v; }
INLINE row to_bits(vec v) { return (row)v; }
#endif
#define SIGN_SHIFT (8 * (int)sizeof(bits) - 1)
#define ALL_BUT_SIGN ((bits)~((uint32_t)1 << SIGN_SHIFT))

typedef bits half_row __attribute__((vector_size(LANES / 2 * sizeof(bits))));
INLINE row load_bits(const void *p, const int lanes) {
    row v;
    half_row h;
    memcpy(&h, p, sizeof h);
    if (lanes < LANES) return SHUFFLE(h, (half_row){0}, HALF, REST);
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_bits(void *p, row v, const int lanes) {
    half_row h = SHUFFLE(v, v, HALF);
    if (lanes < LANES)
        memcpy(p, &h, sizeof h);
    else
        memcpy(p, &v, sizeof v);
}
INLINE row choose_bits(row mask, row yes, row no) { return (yes & mask) | (no & ~mask); }
INLINE vec load_some(const real *p, const int lanes) { return widen(load_bits(p, lanes)); }
INLINE void store_some(real *p, vec v, const int lanes) { store_bits(p, to_bits(v), lanes); }

/* The same for whole vectors. */
INLINE vec load_float(const float *p) { return load_floats(p, LANES); }
INLINE row load_row(const void *p) { return load_bits(p, LANES); }
INLINE vec load(const real *p) { return load_some(p, LANES); }
INLINE void store_float(float *p, vec v) { store_floats(p, v, LANES); }
INLINE void store_row(void *p, row h) { store_bits(p, h, LANES); }
INLINE void store(real *p, vec v) { store_some(p, v, LANES); }
