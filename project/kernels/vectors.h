/* Maps and vectors: what the kernels share.
 *
 * Compiled once for each type of the maps: float, or with -DBFLOAT16. Maps are channels-last: pixels (images, lines and
 * columns together) of `channels` values, a multiple of 8. Vectors are GCC's and Clang's own, eight lanes wide.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
#define LANES 8
#define INLINE static inline __attribute__((always_inline))

INLINE vec load_float(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_float(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* real: a value of a map; bits: an integer of its size; row: eight of them; widen: eight values as floats. */
#ifdef BFLOAT16
typedef uint16_t real;
typedef int16_t bits;
typedef bits row __attribute__((vector_size(16)));
typedef bits wide __attribute__((vector_size(32)));
#define INFINITE 0x7f80
INLINE vec widen(row h) { return (vec)__builtin_shufflevector((row){0}, h, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15); }
INLINE void store(real *p, vec v) { /* to nearest, ties to even */
    ivec u = (ivec)v;
    wide w = (wide)(u + 0x7fff + ((u >> 16) & 1));
    row h = __builtin_shufflevector(w, w, 1, 3, 5, 7, 9, 11, 13, 15);
    memcpy(p, &h, sizeof h);
}
#else
typedef float real;
typedef int32_t bits;
typedef ivec row;
#define INFINITE 0x7f800000
INLINE vec widen(row h) { return (vec)h; }
INLINE void store(real *p, vec v) { store_float(p, v); }
#endif
#define SIGN_SHIFT (8 * (int)sizeof(bits) - 1)
#define ALL_BUT_SIGN ((bits)~((uint32_t)1 << SIGN_SHIFT))

INLINE row load_row(const void *p) {
    row h;
    memcpy(&h, p, sizeof h);
    return h;
}
INLINE void store_row(void *p, row h) { memcpy(p, &h, sizeof h); }
INLINE vec load(const real *p) { return widen(load_row(p)); }

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }
