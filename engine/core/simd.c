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

typedef struct { __m512i q, twice, mask; } modulus;

// x and y, below 4q, become x + w*y and x - w*y, below 4q again (Harvey, "Faster
// arithmetic for number-theoretic transforms", 2014, with 52-bit words).
static inline __attribute__((always_inline)) VECTOR void butterfly(__m512i *x, __m512i *y, __m512i w, __m512i quotient, const modulus *m) {
    __m512i zero = _mm512_setzero_si512();
    __m512i a = _mm512_min_epu64(*x, _mm512_sub_epi64(*x, m->twice));
    __m512i b = _mm512_min_epu64(*y, _mm512_sub_epi64(*y, m->twice));
    __m512i t = _mm512_madd52hi_epu64(zero, b, quotient);
    t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, b, w), _mm512_madd52lo_epu64(zero, t, m->q));
    t = _mm512_and_si512(t, m->mask);
    *x = _mm512_add_epi64(a, t);
    *y = _mm512_sub_epi64(_mm512_add_epi64(a, m->twice), t);
}

// x and y, below 2q, become x + y and w*(x - y), below 2q again: what butterfly does,
// undone.
static inline __attribute__((always_inline)) VECTOR void join(__m512i *x, __m512i *y, __m512i w, __m512i quotient, const modulus *m) {
    __m512i zero = _mm512_setzero_si512();
    __m512i a = _mm512_add_epi64(*x, *y);
    __m512i b = _mm512_sub_epi64(_mm512_add_epi64(*x, m->twice), *y);
    b = _mm512_min_epu64(b, _mm512_sub_epi64(b, m->twice));
    __m512i t = _mm512_madd52hi_epu64(zero, b, quotient);
    t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, b, w), _mm512_madd52lo_epu64(zero, t, m->q));
    *x = _mm512_min_epu64(a, _mm512_sub_epi64(a, m->twice));
    *y = _mm512_and_si512(t, m->mask);
}

typedef void step(__m512i *x, __m512i *y, __m512i w, __m512i quotient, const modulus *m);

// One stage whose butterflies lie within 16 numbers. gather says where the left and
// the right halves are, scatter takes them back, spread repeats the roots.
static inline __attribute__((always_inline)) VECTOR void narrow(
        step *apply, uint64_t *values, long n, long stride, const uint64_t *roots, const uint64_t *quotients,
        const modulus *m, __m512i left, __m512i right, __m512i first, __m512i second, __m512i spread) {
    roots += n / (2 * stride), quotients += n / (2 * stride);
    long count = 8 / stride; // roots for 16 numbers
    __mmask8 some = (__mmask8)((1 << count) - 1);
    for (long i = 0; i < n; i += 16, roots += count, quotients += count) {
        __m512i a = LOAD(values + i), b = LOAD(values + i + 8);
        __m512i x = _mm512_permutex2var_epi64(a, left, b), y = _mm512_permutex2var_epi64(a, right, b);
        __m512i w = _mm512_permutexvar_epi64(spread, _mm512_maskz_loadu_epi64(some, roots));
        __m512i s = _mm512_permutexvar_epi64(spread, _mm512_maskz_loadu_epi64(some, quotients));
        apply(&x, &y, w, s, m);
        STORE(values + i, _mm512_permutex2var_epi64(x, first, y));
        STORE(values + i + 8, _mm512_permutex2var_epi64(x, second, y));
    }
}

#define LANES(a, b, c, d, e, f, g, h) _mm512_setr_epi64(a, b, c, d, e, f, g, h)

// The stages of stride 4, 2 and 1.
#define NARROW4(apply)                                                                                \
    narrow(apply, values, n, 4, roots, quotients, &m, LANES(0, 1, 2, 3, 8, 9, 10, 11),                 \
           LANES(4, 5, 6, 7, 12, 13, 14, 15), LANES(0, 1, 2, 3, 8, 9, 10, 11),                         \
           LANES(4, 5, 6, 7, 12, 13, 14, 15), LANES(0, 0, 0, 0, 1, 1, 1, 1))
#define NARROW2(apply)                                                                                \
    narrow(apply, values, n, 2, roots, quotients, &m, LANES(0, 1, 4, 5, 8, 9, 12, 13),                 \
           LANES(2, 3, 6, 7, 10, 11, 14, 15), LANES(0, 1, 8, 9, 2, 3, 10, 11),                         \
           LANES(4, 5, 12, 13, 6, 7, 14, 15), LANES(0, 0, 1, 1, 2, 2, 3, 3))
#define NARROW1(apply)                                                                                \
    narrow(apply, values, n, 1, roots, quotients, &m, LANES(0, 2, 4, 6, 8, 10, 12, 14),                \
           LANES(1, 3, 5, 7, 9, 11, 13, 15), LANES(0, 8, 1, 9, 2, 10, 3, 11),                          \
           LANES(4, 12, 5, 13, 6, 14, 7, 15), LANES(0, 1, 2, 3, 4, 5, 6, 7))

// A stage of a stride of at least 8.
static inline __attribute__((always_inline)) VECTOR void wide(step *apply, uint64_t *values, long n, long stride,
                                                              const uint64_t *roots, const uint64_t *quotients,
                                                              const modulus *m) {
    long blocks = n / (2 * stride);
    for (long block = 0; block < blocks; block++) {
        uint64_t *x = values + 2 * stride * block, *y = x + stride;
        __m512i w = _mm512_set1_epi64((long long)roots[blocks + block]);
        __m512i s = _mm512_set1_epi64((long long)quotients[blocks + block]);
        for (long i = 0; i < stride; i += 8) {
            __m512i a = LOAD(x + i), b = LOAD(y + i);
            apply(&a, &b, w, s, m);
            STORE(x + i, a);
            STORE(y + i, b);
        }
    }
}

#define MODULUS                                                                                \
    {_mm512_set1_epi64((long long)prime), _mm512_set1_epi64((long long)(2 * prime)),           \
     _mm512_set1_epi64((1LL << 52) - 1)}

VECTOR void cl_simd_transform(uint64_t *values, long n, const uint64_t *roots, const uint64_t *quotients, uint64_t prime) {
    modulus m = MODULUS;
    for (long stride = n / 2; stride >= 8; stride /= 2)
        wide(butterfly, values, n, stride, roots, quotients, &m);
    NARROW4(butterfly);
    NARROW2(butterfly);
    NARROW1(butterfly);
    for (long i = 0; i < n; i += 8) {
        __m512i v = LOAD(values + i);
        v = _mm512_min_epu64(v, _mm512_sub_epi64(v, m.twice));
        STORE(values + i, _mm512_min_epu64(v, _mm512_sub_epi64(v, m.q)));
    }
}

VECTOR void cl_simd_inverse(uint64_t *values, long n, const uint64_t *roots, const uint64_t *quotients, uint64_t prime) {
    modulus m = MODULUS;
    NARROW1(join);
    NARROW2(join);
    NARROW4(join);
    for (long stride = 8; stride < n; stride *= 2)
        wide(join, values, n, stride, roots, quotients, &m);
    // The root 0, which no stage uses, is 1/n.
    __m512i w = _mm512_set1_epi64((long long)roots[0]), s = _mm512_set1_epi64((long long)quotients[0]);
    __m512i zero = _mm512_setzero_si512();
    for (long i = 0; i < n; i += 8) {
        __m512i v = LOAD(values + i), t = _mm512_madd52hi_epu64(zero, v, s);
        t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, v, w), _mm512_madd52lo_epu64(zero, t, m.q));
        t = _mm512_and_si512(t, m.mask);
        STORE(values + i, _mm512_min_epu64(t, _mm512_sub_epi64(t, m.q)));
    }
}

// x - w*y, below 4q, for x and y below 2q.
static inline __attribute__((always_inline)) VECTOR __m512i subtract(__m512i x, __m512i y, __m512i w, __m512i quotient, const modulus *m) {
    __m512i zero = _mm512_setzero_si512(), t = _mm512_madd52hi_epu64(zero, y, quotient);
    t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, y, w), _mm512_madd52lo_epu64(zero, t, m->q));
    return _mm512_sub_epi64(_mm512_add_epi64(x, m->twice), _mm512_and_si512(t, m->mask));
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
        __m512i v = LOAD(values + i);
        v = _mm512_min_epu64(v, _mm512_sub_epi64(v, m.twice));
        STORE(values + i, _mm512_min_epu64(v, _mm512_sub_epi64(v, m.q)));
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
    __m512i q = _mm512_set1_epi64((long long)prime), w = _mm512_set1_epi64((long long)factor);
    __m512i s = _mm512_set1_epi64((long long)quotient), zero = _mm512_setzero_si512(), mask = _mm512_set1_epi64((1LL << 52) - 1);
    for (long i = 0; i < n; i += 8) {
        __m512i v = _mm512_sub_epi64(_mm512_add_epi64(LOAD(x + i), q), LOAD(y + i));
        __m512i t = _mm512_madd52hi_epu64(zero, v, s);
        v = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, v, w), _mm512_madd52lo_epu64(zero, t, q));
        v = _mm512_and_si512(v, mask);
        STORE(out + i, _mm512_min_epu64(v, _mm512_sub_epi64(v, q)));
    }
}

// The steps of one coefficient's conversion between moduli are those of the library, its
// floating-point division too: whether a sum runs over has to come out the same.
VECTOR void cl_simd_split(uint64_t *x, uint64_t *y, long n, const uint64_t *constants) {
    __m512i zero = _mm512_setzero_si512(), mask = _mm512_set1_epi64((1LL << 52) - 1), q[2], h[2], w[2], s[2];
    __m512d divisor[2];
    for (int j = 0; j < 2; j++, constants += 4) {
        q[j] = _mm512_set1_epi64((long long)constants[0]), h[j] = _mm512_set1_epi64((long long)constants[1]);
        w[j] = _mm512_set1_epi64((long long)constants[2]), s[j] = _mm512_set1_epi64((long long)constants[3]);
        divisor[j] = _mm512_set1_pd((double)constants[0]);
    }
    for (long i = 0; i < n; i += 8) {
        __m512i v[2] = {LOAD(x + i), LOAD(y + i)};
        __m512d sum = _mm512_setzero_pd();
        for (int j = 0; j < 2; j++) {
            __m512i a = _mm512_add_epi64(v[j], h[j]), t = _mm512_madd52hi_epu64(zero, a, s[j]);
            t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, a, w[j]), _mm512_madd52lo_epu64(zero, t, q[j]));
            t = _mm512_and_si512(t, mask);
            v[j] = _mm512_min_epu64(t, _mm512_sub_epi64(t, q[j]));
            sum = _mm512_add_pd(sum, _mm512_div_pd(_mm512_cvtepu64_pd(v[j]), divisor[j]));
        }
        STORE(x + i, v[0]);
        STORE(y + i, _mm512_or_si512(v[1], _mm512_slli_epi64(_mm512_cvttpd_epu64(sum), 52)));
    }
}

VECTOR void cl_simd_extend(const uint64_t *x, const uint64_t *y, long n, const uint64_t *constants, uint64_t prime, uint64_t *out) {
    modulus m = MODULUS;
    __m512i zero = _mm512_setzero_si512(), fourfold = _mm512_add_epi64(m.twice, m.twice);
    __m512i v = _mm512_set1_epi64((long long)constants[0]), v_ = _mm512_set1_epi64((long long)constants[1]);
    __m512i w = _mm512_set1_epi64((long long)constants[2]), w_ = _mm512_set1_epi64((long long)constants[3]);
    __m512i over = _mm512_maskz_loadu_epi64(0x07, constants + 4);
    for (long i = 0; i < n; i += 8) {
        // The multiplication takes the low 52 bits of its operands.
        __m512i a = LOAD(x + i), b = LOAD(y + i);
        __m512i s = _mm512_madd52hi_epu64(zero, a, v_), t = _mm512_madd52hi_epu64(zero, b, w_);
        s = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, a, v), _mm512_madd52lo_epu64(zero, s, m.q));
        t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, b, w), _mm512_madd52lo_epu64(zero, t, m.q));
        s = _mm512_add_epi64(_mm512_and_si512(s, m.mask), _mm512_and_si512(t, m.mask)); // each below 2q
        s = _mm512_add_epi64(s, _mm512_permutexvar_epi64(_mm512_srli_epi64(b, 52), over));
        STORE(out + i, _mm512_min_epu64(s, _mm512_sub_epi64(s, fourfold)));
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
            for (int j = 0; j < 3; j++) {
                __m512i t = _mm512_madd52hi_epu64(zero, words[j], s[j]);
                t = _mm512_sub_epi64(_mm512_madd52lo_epu64(zero, words[j], w[j]), _mm512_madd52lo_epu64(zero, t, m.q));
                total = _mm512_add_epi64(total, _mm512_and_si512(t, m.mask)); // each below 2q
            }
            total = _mm512_min_epu64(total, _mm512_sub_epi64(total, fourfold));
            total = _mm512_min_epu64(total, _mm512_sub_epi64(total, m.twice));
            STORE(out + i, _mm512_min_epu64(total, _mm512_sub_epi64(total, m.q)));
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
void cl_simd_recenter(const uint64_t *v, long n, uint64_t p, uint64_t h, uint64_t q, uint64_t s, uint64_t r, uint64_t *out) {}
void cl_simd_subtract_multiply(const uint64_t *x, const uint64_t *y, long n, uint64_t w, uint64_t s, uint64_t q, uint64_t *out) {}
void cl_simd_split(uint64_t *x, uint64_t *y, long n, const uint64_t *c) {}
void cl_simd_extend(const uint64_t *x, const uint64_t *y, long n, const uint64_t *c, uint64_t q, uint64_t *out) {}

#endif
