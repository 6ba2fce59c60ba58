//go:build cgo

// The inner loops of linear transformations and key switches with 52-bit multiply-add,
// eight numbers at a time: the transforms and the sum of products. The Go code beside
// does the same on every processor; tests hold the two equal, bit for bit.

#include "simd.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define VECTOR __attribute__((target("avx512f,avx512dq,avx512ifma")))
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define STORE(p, v) _mm512_storeu_si512((void *)(p), v)

int cl_simd_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512ifma");
}

static inline VECTOR __m512i lift(__m512i value, __m512i multiplier, __m512i prime) {
    __m512i product = _mm512_mullo_epi64(value, multiplier);
    return _mm512_add_epi64(product, _mm512_and_si512(prime, _mm512_srai_epi64(product, 63)));
}

VECTOR void cl_simd_lift16(const int16_t *values, long n, int64_t multiplier, uint64_t prime, uint64_t *out) {
    __m512i m = _mm512_set1_epi64(multiplier), q = _mm512_set1_epi64((long long)prime);
    for (long i = 0; i < n; i += 8)
        STORE(out + i, lift(_mm512_cvtepi16_epi64(_mm_loadu_si128((const __m128i *)(values + i))), m, q));
}

VECTOR void cl_simd_lift32(const int32_t *values, long n, int64_t multiplier, uint64_t prime, uint64_t *out) {
    __m512i m = _mm512_set1_epi64(multiplier), q = _mm512_set1_epi64((long long)prime);
    for (long i = 0; i < n; i += 8)
        STORE(out + i, lift(_mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)(values + i))), m, q));
}

// How lazily sums are reduced depends on the room that a prime leaves in 52 bits.
enum room { NARROW, WIDE, WIDEST }; // a prime below 2^51, 2^50 or 2^46

typedef struct { __m512i q, twice, mask, minus; } modulus;

#define MODULUS                                                                                \
    {_mm512_set1_epi64((long long)prime), _mm512_set1_epi64((long long)(2 * prime)),           \
     _mm512_set1_epi64((1LL << 52) - 1), _mm512_set1_epi64((1LL << 52) - (long long)prime)}

// w*y, below 2q, for y below 2^52 (Shoup's multiplication with 52-bit words).
static inline __attribute__((always_inline)) VECTOR __m512i multiply(__m512i y, __m512i w, __m512i quotient, const modulus *m) {
    __m512i zero = _mm512_setzero_si512(), t = _mm512_madd52hi_epu64(zero, y, quotient);
    return _mm512_and_si512(_mm512_madd52lo_epu64(_mm512_madd52lo_epu64(zero, y, w), t, m->minus), m->mask);
}

static inline __attribute__((always_inline)) VECTOR __m512i subtract_above(__m512i x, __m512i limit) {
    return _mm512_min_epu64(x, _mm512_sub_epi64(x, limit));
}

typedef void step(enum room room, __m512i *x, __m512i *y, __m512i w, __m512i quotient, const modulus *m);

// x and y, below 4q, become x + w*y and x - w*y, below 4q again (Harvey, "Faster
// arithmetic for number-theoretic transforms", 2014). In the widest room nothing is
// reduced: each stage adds at most 2q.
static inline __attribute__((always_inline)) VECTOR void butterfly(enum room room, __m512i *x, __m512i *y, __m512i w, __m512i quotient,
                                                                   const modulus *m) {
    __m512i a = room == WIDEST ? *x : subtract_above(*x, m->twice);
    __m512i t = multiply(room == NARROW ? subtract_above(*y, m->twice) : *y, w, quotient, m);
    *x = _mm512_add_epi64(a, t);
    *y = _mm512_sub_epi64(_mm512_add_epi64(a, m->twice), t);
}

// x and y, below 2q, become x + y and w*(x - y), below 2q again: what butterfly does,
// undone.
static inline __attribute__((always_inline)) VECTOR void join(enum room room, __m512i *x, __m512i *y, __m512i w, __m512i quotient,
                                                              const modulus *m) {
    __m512i b = _mm512_sub_epi64(_mm512_add_epi64(*x, m->twice), *y);
    *x = subtract_above(_mm512_add_epi64(*x, *y), m->twice);
    *y = multiply(room == NARROW ? subtract_above(b, m->twice) : b, w, quotient, m);
}

// A root with its quotient, in every lane.
typedef struct { __m512i w, s; } root;

static inline __attribute__((always_inline)) VECTOR root repeated(const uint64_t *roots, const uint64_t *quotients, long i) {
    root r = {_mm512_set1_epi64((long long)roots[i]), _mm512_set1_epi64((long long)quotients[i])};
    return r;
}

#define LANES(a, b, c, d, e, f, g, h) _mm512_setr_epi64(a, b, c, d, e, f, g, h)

// The roots of a stage of a stride of 4, 2 or 1 for the 16 numbers from i on.
static inline __attribute__((always_inline)) VECTOR root spread(const uint64_t *roots, const uint64_t *quotients, long n,
                                                                long stride, long i) {
    long first = n / (2 * stride) + i / (2 * stride), count = 8 / stride;
    __mmask8 some = (__mmask8)((1 << count) - 1);
    __m512i lanes = stride == 4 ? LANES(0, 0, 0, 0, 1, 1, 1, 1) : stride == 2 ? LANES(0, 0, 1, 1, 2, 2, 3, 3) : LANES(0, 1, 2, 3, 4, 5, 6, 7);
    root r = {_mm512_permutexvar_epi64(lanes, _mm512_maskz_loadu_epi64(some, roots + first)),
              _mm512_permutexvar_epi64(lanes, _mm512_maskz_loadu_epi64(some, quotients + first))};
    return r;
}

// Two vectors become two others, of lanes 0 to 7 of the first and 8 to 15 of the second.
#define REGROUP(x, y, left, right)                                  \
    do {                                                            \
        __m512i to = _mm512_permutex2var_epi64(x, left, y);         \
        y = _mm512_permutex2var_epi64(x, right, y);                 \
        x = to;                                                     \
    } while (0)

// Between 16 numbers in order and the halves that stages of strides 4, 2 and 1 take.
#define HALVES4(x, y) REGROUP(x, y, LANES(0, 1, 2, 3, 8, 9, 10, 11), LANES(4, 5, 6, 7, 12, 13, 14, 15))
#define HALVES2(x, y) REGROUP(x, y, LANES(0, 1, 8, 9, 4, 5, 12, 13), LANES(2, 3, 10, 11, 6, 7, 14, 15))
#define HALVES1(x, y) REGROUP(x, y, LANES(0, 8, 2, 10, 4, 12, 6, 14), LANES(1, 9, 3, 11, 5, 13, 7, 15))
#define ORDER(x, y) REGROUP(x, y, LANES(0, 8, 1, 9, 2, 10, 3, 11), LANES(4, 12, 5, 13, 6, 14, 7, 15))
#define EVENODD(x, y) REGROUP(x, y, LANES(0, 2, 4, 6, 8, 10, 12, 14), LANES(1, 3, 5, 7, 9, 11, 13, 15))

// Two stages in one pass over memory: of a stride of at least 8, and of twice that stride.
// A transform goes down with strides, its inverse goes up.
static inline __attribute__((always_inline)) VECTOR void pass(step *apply, enum room room, int down, uint64_t *values, long n,
                                                              long stride, const uint64_t *roots, const uint64_t *quotients,
                                                              const modulus *m) {
    for (long at = 0; at < n; at += 4 * stride) {
        long block = (n + at) / (4 * stride);
        root whole = repeated(roots, quotients, block);
        root left = repeated(roots, quotients, 2 * block), right = repeated(roots, quotients, 2 * block + 1);
        for (uint64_t *x = values + at; x < values + at + stride; x += 8) {
            __m512i a = LOAD(x), b = LOAD(x + stride), c = LOAD(x + 2 * stride), d = LOAD(x + 3 * stride);
            if (down) {
                apply(room, &a, &c, whole.w, whole.s, m);
                apply(room, &b, &d, whole.w, whole.s, m);
            }
            apply(room, &a, &b, left.w, left.s, m);
            apply(room, &c, &d, right.w, right.s, m);
            if (!down) {
                apply(room, &a, &c, whole.w, whole.s, m);
                apply(room, &b, &d, whole.w, whole.s, m);
            }
            STORE(x, a);
            STORE(x + stride, b);
            STORE(x + 2 * stride, c);
            STORE(x + 3 * stride, d);
        }
    }
}

// The stage of the greatest stride, half of all.
static inline __attribute__((always_inline)) VECTOR void greatest(step *apply, enum room room, uint64_t *values, long n,
                                                                  const uint64_t *roots, const uint64_t *quotients,
                                                                  const modulus *m) {
    root r = repeated(roots, quotients, 1);
    for (uint64_t *x = values; x < values + n / 2; x += 8) {
        __m512i a = LOAD(x), b = LOAD(x + n / 2);
        apply(room, &a, &b, r.w, r.s, m);
        STORE(x, a);
        STORE(x + n / 2, b);
    }
}

// Whether the stages of a stride of at least 8 are odd in number.
static int odd(long n) { return !(__builtin_ctzl((unsigned long)n) & 1); }

static inline __attribute__((always_inline)) VECTOR void transform(enum room room, uint64_t *values, long n, const uint64_t *roots,
                                                                   const uint64_t *quotients, uint64_t prime) {
    modulus m = MODULUS;
    __m512i zero = _mm512_setzero_si512(), reciprocal = _mm512_set1_epi64((long long)((1ULL << 52) / prime));
    if (odd(n))
        greatest(butterfly, room, values, n, roots, quotients, &m);
    for (long stride = odd(n) ? n / 8 : n / 4; stride >= 8; stride /= 4)
        pass(butterfly, room, 1, values, n, stride, roots, quotients, &m);
    for (long i = 0; i < n; i += 16) {
        root four = spread(roots, quotients, n, 4, i), two = spread(roots, quotients, n, 2, i), one = spread(roots, quotients, n, 1, i);
        __m512i x = LOAD(values + i), y = LOAD(values + i + 8);
        HALVES4(x, y);
        butterfly(room, &x, &y, four.w, four.s, &m);
        HALVES2(x, y);
        butterfly(room, &x, &y, two.w, two.s, &m);
        HALVES1(x, y);
        butterfly(room, &x, &y, one.w, one.s, &m);
        ORDER(x, y);
        if (room == WIDEST) { // far above the prime: divided
            x = _mm512_and_si512(_mm512_madd52lo_epu64(x, _mm512_madd52hi_epu64(zero, x, reciprocal), m.minus), m.mask);
            y = _mm512_and_si512(_mm512_madd52lo_epu64(y, _mm512_madd52hi_epu64(zero, y, reciprocal), m.minus), m.mask);
        } else {
            x = subtract_above(x, m.twice), y = subtract_above(y, m.twice);
        }
        STORE(values + i, subtract_above(x, m.q));
        STORE(values + i + 8, subtract_above(y, m.q));
    }
}

VECTOR void cl_simd_transform(uint64_t *values, long n, const uint64_t *roots, const uint64_t *quotients, uint64_t prime) {
    if (prime < 1ULL << 46)
        transform(WIDEST, values, n, roots, quotients, prime);
    else if (prime < 1ULL << 50)
        transform(WIDE, values, n, roots, quotients, prime);
    else
        transform(NARROW, values, n, roots, quotients, prime);
}

static inline __attribute__((always_inline)) VECTOR void inverse(enum room room, uint64_t *values, long n, const uint64_t *roots,
                                                                 const uint64_t *quotients, uint64_t prime) {
    modulus m = MODULUS;
    for (long i = 0; i < n; i += 16) {
        root four = spread(roots, quotients, n, 4, i), two = spread(roots, quotients, n, 2, i), one = spread(roots, quotients, n, 1, i);
        __m512i x = LOAD(values + i), y = LOAD(values + i + 8);
        EVENODD(x, y);
        join(room, &x, &y, one.w, one.s, &m);
        HALVES1(x, y); // which undoes itself, as the next two do
        join(room, &x, &y, two.w, two.s, &m);
        HALVES2(x, y);
        join(room, &x, &y, four.w, four.s, &m);
        HALVES4(x, y);
        STORE(values + i, x);
        STORE(values + i + 8, y);
    }
    for (long stride = 8; 4 * stride <= n; stride *= 4)
        pass(join, room, 0, values, n, stride, roots, quotients, &m);
    if (odd(n))
        greatest(join, room, values, n, roots, quotients, &m);
    // The root 0, which no stage uses, is 1/n.
    root last = repeated(roots, quotients, 0);
    for (long i = 0; i < n; i += 8)
        STORE(values + i, subtract_above(multiply(LOAD(values + i), last.w, last.s, &m), m.q));
}

VECTOR void cl_simd_inverse(uint64_t *values, long n, const uint64_t *roots, const uint64_t *quotients, uint64_t prime) {
    if (prime < 1ULL << 50)
        inverse(WIDE, values, n, roots, quotients, prime);
    else
        inverse(NARROW, values, n, roots, quotients, prime);
}

// x - w*y, below 4q, for x and y below 2q.
static inline __attribute__((always_inline)) VECTOR __m512i subtract(__m512i x, __m512i y, __m512i w, __m512i quotient, const modulus *m) {
    return _mm512_sub_epi64(_mm512_add_epi64(x, m->twice), multiply(y, w, quotient, m));
}

VECTOR void cl_simd_fold(uint64_t *values, long n, uint64_t root, uint64_t quotient, uint64_t prime) {
    modulus m = MODULUS;
    __m512i w = _mm512_set1_epi64((long long)root), s = _mm512_set1_epi64((long long)quotient);
    __m512i turned = LANES(7, 6, 5, 4, 3, 2, 1, 0);
    for (long i = 0; i < n / 2; i += 8) {
        // Numbers i to i + 7 meet n - i down to n - i - 7. Number 0 meets none: number n does not exist.
        __mmask8 low = i ? 0xff : 0xfe, high = i ? 0xff : 0x7f;
        uint64_t *left = values + i, *right = values + n - 7 - i;
        __m512i x = LOAD(left), y = _mm512_maskz_loadu_epi64(high, right);
        __m512i a = subtract(x, _mm512_permutexvar_epi64(turned, y), w, s, &m);
        __m512i b = subtract(y, _mm512_permutexvar_epi64(turned, x), w, s, &m);
        _mm512_mask_storeu_epi64(left, low, a);
        _mm512_mask_storeu_epi64(right, high, b);
    }
    // The middle meets itself.
    uint64_t middle = values[n / 2], high = (uint64_t)(((unsigned __int128)middle * quotient) >> 52);
    values[n / 2] = middle + 2 * prime - ((middle * root - high * prime) & ((1ULL << 52) - 1));
}

VECTOR void cl_simd_unfold(uint64_t *values, long n, uint64_t root, uint64_t quotient, uint64_t prime) {
    modulus m = MODULUS;
    cl_simd_fold(values, n, root, quotient, prime);
    values[0] *= 2;
    for (long i = 0; i < n; i += 8) {
        STORE(values + i, subtract_above(subtract_above(LOAD(values + i), m.twice), m.q));
    }
}

VECTOR void cl_simd_recenter(const uint64_t *values, long n, uint64_t from, uint64_t half, uint64_t to, uint64_t quotient,
                             uint64_t rest, uint64_t *out) {
    __m512i p = _mm512_set1_epi64((long long)from), h = _mm512_set1_epi64((long long)half);
    __m512i q = _mm512_set1_epi64((long long)to), s = _mm512_set1_epi64((long long)quotient);
    __m512i r = _mm512_set1_epi64((long long)rest), zero = _mm512_setzero_si512(), mask = _mm512_set1_epi64((1LL << 52) - 1);
    for (long i = 0; i < n; i += 8) {
        __m512i v = _mm512_add_epi64(LOAD(values + i), h);
        v = _mm512_min_epu64(v, _mm512_sub_epi64(v, p));
        __m512i t = _mm512_madd52hi_epu64(zero, v, s);
        v = _mm512_and_si512(_mm512_sub_epi64(v, _mm512_madd52lo_epu64(zero, t, q)), mask);
        v = _mm512_sub_epi64(_mm512_min_epu64(v, _mm512_sub_epi64(v, q)), r);
        STORE(out + i, _mm512_min_epu64(v, _mm512_add_epi64(v, q)));
    }
}

VECTOR void cl_simd_subtract_multiply(const uint64_t *x, const uint64_t *y, long n, uint64_t factor, uint64_t quotient,
                                      uint64_t prime, uint64_t *out) {
    modulus m = MODULUS;
    __m512i w = _mm512_set1_epi64((long long)factor), s = _mm512_set1_epi64((long long)quotient);
    for (long i = 0; i < n; i += 8) {
        __m512i v = _mm512_sub_epi64(_mm512_add_epi64(LOAD(x + i), m.q), LOAD(y + i));
        STORE(out + i, subtract_above(multiply(v, w, s, &m), m.q));
    }
}

VECTOR void cl_simd_multiply_add(const uint64_t *x, long n, uint64_t factor, uint64_t quotient, uint64_t prime, uint64_t *out) {
    modulus m = MODULUS;
    __m512i w = _mm512_set1_epi64((long long)factor), s = _mm512_set1_epi64((long long)quotient);
    for (long i = 0; i < n; i += 8) {
        __m512i v = _mm512_add_epi64(LOAD(out + i), multiply(LOAD(x + i), w, s, &m));
        STORE(out + i, subtract_above(subtract_above(v, m.twice), m.q));
    }
}

VECTOR void cl_simd_add(const uint64_t *x, const uint64_t *y, long n, uint64_t prime, uint64_t *out) {
    __m512i q = _mm512_set1_epi64((long long)prime);
    for (long i = 0; i < n; i += 8)
        STORE(out + i, subtract_above(_mm512_add_epi64(LOAD(x + i), LOAD(y + i)), q));
}

// Eight numbers by their places, which lie within eight aligned ones.
static inline __attribute__((always_inline)) VECTOR __m512i permuted(const uint64_t *in, const uint64_t *index) {
    return _mm512_permutexvar_epi64(LOAD(index), LOAD(in + (*index & ~7ULL)));
}

VECTOR void cl_simd_permute(const uint64_t *in, long n, const uint64_t *index, uint64_t *out) {
    for (long i = 0; i < n; i += 8)
        STORE(out + i, permuted(in, index + i));
}

VECTOR void cl_simd_add_permuted(const uint64_t *in, long n, const uint64_t *index, uint64_t prime, uint64_t *out) {
    __m512i q = _mm512_set1_epi64((long long)prime);
    for (long i = 0; i < n; i += 8)
        STORE(out + i, subtract_above(_mm512_add_epi64(LOAD(out + i), permuted(in, index + i)), q));
}

// low + 2^52 high divided by 2^52 modulo q, at most that quotient and q more (Montgomery's
// reduction); inverse is 1/q modulo 2^52.
static inline __attribute__((always_inline)) VECTOR __m512i quotient_of(__m512i low, __m512i high, __m512i inverse, const modulus *m) {
    __m512i zero = _mm512_setzero_si512();
    __m512i t = _mm512_madd52hi_epu64(zero, _mm512_madd52lo_epu64(zero, low, inverse), m->q);
    return _mm512_sub_epi64(_mm512_add_epi64(high, _mm512_add_epi64(_mm512_srli_epi64(low, 52), m->q)), t);
}

// The same for a sum below 2^53 q, below q.
static inline __attribute__((always_inline)) VECTOR __m512i reduced(__m512i low, __m512i high, __m512i inverse, const modulus *m) {
    return subtract_above(subtract_above(quotient_of(low, high, inverse, m), m->twice), m->q);
}

VECTOR void cl_simd_tensor(const uint64_t *a0, const uint64_t *a1, const uint64_t *b0, const uint64_t *b1, long n, uint64_t power,
                           uint64_t quotient, uint64_t inverse, uint64_t prime, uint64_t *c0, uint64_t *c1, uint64_t *c2) {
    modulus m = MODULUS;
    __m512i w = _mm512_set1_epi64((long long)power), s = _mm512_set1_epi64((long long)quotient);
    __m512i inv = _mm512_set1_epi64((long long)inverse), zero = _mm512_setzero_si512();
    for (long i = 0; i < n; i += 8) {
        __m512i x0 = multiply(LOAD(a0 + i), w, s, &m), x1 = multiply(LOAD(a1 + i), w, s, &m);
        __m512i y0 = LOAD(b0 + i), y1 = LOAD(b1 + i);
        __m512i low = _mm512_madd52lo_epu64(_mm512_madd52lo_epu64(zero, x0, y1), x1, y0);
        __m512i high = _mm512_madd52hi_epu64(_mm512_madd52hi_epu64(zero, x0, y1), x1, y0);
        STORE(c0 + i, reduced(_mm512_madd52lo_epu64(zero, x0, y0), _mm512_madd52hi_epu64(zero, x0, y0), inv, &m));
        STORE(c1 + i, reduced(low, high, inv, &m));
        STORE(c2 + i, reduced(_mm512_madd52lo_epu64(zero, x1, y1), _mm512_madd52hi_epu64(zero, x1, y1), inv, &m));
    }
}

// The steps of one coefficient's conversion between moduli are those of the library, its
// floating-point division too: whether a sum runs over has to come out the same.
VECTOR void cl_simd_split(uint64_t *x, uint64_t *y, long n, const uint64_t *constants) {
    uint64_t prime = constants[0];
    modulus m[2] = {MODULUS};
    prime = constants[4];
    m[1] = (modulus)MODULUS;
    __m512i h[2], w[2], s[2];
    __m512d divisor[2];
    for (int j = 0; j < 2; j++, constants += 4) {
        h[j] = _mm512_set1_epi64((long long)constants[1]);
        w[j] = _mm512_set1_epi64((long long)constants[2]), s[j] = _mm512_set1_epi64((long long)constants[3]);
        divisor[j] = _mm512_set1_pd((double)constants[0]);
    }
    for (long i = 0; i < n; i += 8) {
        __m512i v[2] = {LOAD(x + i), LOAD(y + i)};
        __m512d sum = _mm512_setzero_pd();
        for (int j = 0; j < 2; j++) {
            v[j] = subtract_above(multiply(_mm512_add_epi64(v[j], h[j]), w[j], s[j], &m[j]), m[j].q);
            sum = _mm512_add_pd(sum, _mm512_div_pd(_mm512_cvtepu64_pd(v[j]), divisor[j]));
        }
        STORE(x + i, v[0]);
        STORE(y + i, _mm512_or_si512(v[1], _mm512_slli_epi64(_mm512_cvttpd_epu64(sum), 52)));
    }
}

VECTOR void cl_simd_extend(const uint64_t *x, const uint64_t *y, long n, const uint64_t *constants, uint64_t prime, uint64_t *out) {
    modulus m = MODULUS;
    root p = repeated(constants, constants + 1, 0), q = repeated(constants, constants + 1, 2);
    __m512i over = _mm512_maskz_loadu_epi64(0x07, constants + 4), fourfold = _mm512_add_epi64(m.twice, m.twice);
    for (long i = 0; i < n; i += 8) {
        // The multiplication takes the low 52 bits of its operands.
        __m512i y_ = LOAD(y + i), s = _mm512_add_epi64(multiply(LOAD(x + i), p.w, p.s, &m), multiply(y_, q.w, q.s, &m));
        s = _mm512_add_epi64(s, _mm512_permutexvar_epi64(_mm512_srli_epi64(y_, 52), over)); // below 5q
        STORE(out + i, subtract_above(s, fourfold));
    }
}

#define ADD(t)                                                                                 \
    do {                                                                                       \
        __m512i p = LOAD((t).plain + i), x = LOAD((t).c0 + i), y = LOAD((t).c1 + i);           \
        low0 = _mm512_madd52lo_epu64(low0, p, x), high0 = _mm512_madd52hi_epu64(high0, p, x); \
        low1 = _mm512_madd52lo_epu64(low1, p, y), high1 = _mm512_madd52hi_epu64(high1, p, y); \
    } while (0)

static inline __attribute__((always_inline)) VECTOR void accumulate(uint64_t *sums, long n, int count, struct cl_simd_term a,
                                                                    struct cl_simd_term b, struct cl_simd_term c,
                                                                    struct cl_simd_term d) {
    for (long i = 0; i < n; i += 8) {
        __m512i low0 = LOAD(sums + i), high0 = LOAD(sums + n + i);
        __m512i low1 = LOAD(sums + 2 * n + i), high1 = LOAD(sums + 3 * n + i);
        ADD(a);
        if (count > 1)
            ADD(b);
        if (count > 2)
            ADD(c);
        if (count > 3)
            ADD(d);
        STORE(sums + i, low0);
        STORE(sums + n + i, high0);
        STORE(sums + 2 * n + i, low1);
        STORE(sums + 3 * n + i, high1);
    }
}

VECTOR void cl_simd_accumulate(uint64_t *sums, long n, int count, struct cl_simd_term a, struct cl_simd_term b,
                               struct cl_simd_term c, struct cl_simd_term d) {
    if (count == 1)
        accumulate(sums, n, 1, a, b, c, d);
    else if (count == 2)
        accumulate(sums, n, 2, a, b, c, d);
    else if (count == 3)
        accumulate(sums, n, 3, a, b, c, d);
    else
        accumulate(sums, n, 4, a, b, c, d);
}

VECTOR void cl_simd_product(struct cl_simd_terms terms, int count, long n, uint64_t inverse, uint64_t factor, uint64_t quotient,
                            uint64_t prime, uint64_t *out0, uint64_t *out1) {
    modulus m = MODULUS;
    __m512i w = _mm512_set1_epi64((long long)factor), s = _mm512_set1_epi64((long long)quotient);
    __m512i inv = _mm512_set1_epi64((long long)inverse), fourfold = _mm512_add_epi64(m.twice, m.twice);
    for (long i = 0; i < n; i += 8) {
        __m512i low0 = _mm512_setzero_si512(), high0 = low0, low1 = low0, high1 = low0;
        for (int j = 0; j < count; j++)
            ADD(terms.term[j]);
        // Of 8 products below q^2, with q below 2^51, this is below 6q.
        low0 = subtract_above(subtract_above(quotient_of(low0, high0, inv, &m), fourfold), m.twice);
        low1 = subtract_above(subtract_above(quotient_of(low1, high1, inv, &m), fourfold), m.twice);
        STORE(out0 + i, subtract_above(multiply(low0, w, s, &m), m.q));
        STORE(out1 + i, subtract_above(multiply(low1, w, s, &m), m.q));
    }
}

VECTOR void cl_simd_reduce(const uint64_t *sums, long n, const uint64_t *factors, const uint64_t *quotients, uint64_t prime,
                           uint64_t *out0, uint64_t *out1) {
    modulus m = MODULUS;
    __m512i zero = _mm512_setzero_si512(), fourfold = _mm512_add_epi64(m.twice, m.twice), w[3], s[3];
    for (int j = 0; j < 3; j++)
        w[j] = _mm512_set1_epi64((long long)factors[j]), s[j] = _mm512_set1_epi64((long long)quotients[j]);
    for (int component = 0; component < 2; component++, sums += 2 * n) {
        uint64_t *out = component ? out1 : out0;
        for (long i = 0; i < n; i += 8) {
            __m512i low = LOAD(sums + i), high = _mm512_add_epi64(LOAD(sums + n + i), _mm512_srli_epi64(low, 52));
            __m512i words[3] = {_mm512_and_si512(low, m.mask), _mm512_and_si512(high, m.mask), _mm512_srli_epi64(high, 52)};
            __m512i total = zero;
            for (int j = 0; j < 3; j++)
                total = _mm512_add_epi64(total, multiply(words[j], w[j], s[j], &m)); // each below 2q
            STORE(out + i, subtract_above(subtract_above(subtract_above(total, fourfold), m.twice), m.q));
        }
    }
}

#else

int cl_simd_supported(void) { return 0; }
void cl_simd_lift16(const int16_t *v, long n, int64_t m, uint64_t q, uint64_t *out) {}
void cl_simd_lift32(const int32_t *v, long n, int64_t m, uint64_t q, uint64_t *out) {}
void cl_simd_transform(uint64_t *v, long n, const uint64_t *w, const uint64_t *s, uint64_t q) {}
void cl_simd_inverse(uint64_t *v, long n, const uint64_t *w, const uint64_t *s, uint64_t q) {}
void cl_simd_fold(uint64_t *v, long n, uint64_t w, uint64_t s, uint64_t q) {}
void cl_simd_unfold(uint64_t *v, long n, uint64_t w, uint64_t s, uint64_t q) {}
void cl_simd_accumulate(uint64_t *s, long n, int count, struct cl_simd_term a, struct cl_simd_term b,
                        struct cl_simd_term c, struct cl_simd_term d) {}
void cl_simd_reduce(const uint64_t *s, long n, const uint64_t *w, const uint64_t *v, uint64_t q, uint64_t *out0,
                    uint64_t *out1) {}
void cl_simd_product(struct cl_simd_terms t, int count, long n, uint64_t i, uint64_t w, uint64_t s, uint64_t q, uint64_t *out0,
                     uint64_t *out1) {}
void cl_simd_recenter(const uint64_t *v, long n, uint64_t p, uint64_t h, uint64_t q, uint64_t s, uint64_t r, uint64_t *out) {}
void cl_simd_subtract_multiply(const uint64_t *x, const uint64_t *y, long n, uint64_t w, uint64_t s, uint64_t q, uint64_t *out) {}
void cl_simd_multiply_add(const uint64_t *x, long n, uint64_t w, uint64_t s, uint64_t q, uint64_t *out) {}
void cl_simd_add(const uint64_t *x, const uint64_t *y, long n, uint64_t q, uint64_t *out) {}
void cl_simd_permute(const uint64_t *in, long n, const uint64_t *index, uint64_t *out) {}
void cl_simd_add_permuted(const uint64_t *in, long n, const uint64_t *index, uint64_t q, uint64_t *out) {}
void cl_simd_tensor(const uint64_t *a0, const uint64_t *a1, const uint64_t *b0, const uint64_t *b1, long n, uint64_t w, uint64_t s,
                    uint64_t i, uint64_t q, uint64_t *c0, uint64_t *c1, uint64_t *c2) {}
void cl_simd_split(uint64_t *x, uint64_t *y, long n, const uint64_t *c) {}
void cl_simd_extend(const uint64_t *x, const uint64_t *y, long n, const uint64_t *c, uint64_t q, uint64_t *out) {}

#endif
