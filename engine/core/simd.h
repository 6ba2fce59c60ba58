#ifndef CIPHERLM_SIMD_H
#define CIPHERLM_SIMD_H

#include <stdint.h>

// Whether the processor has what the functions below need (AVX-512 IFMA).
int cl_simd_supported(void);

// Small integers times a multiplier, modulo a prime that is greater than the products.
void cl_simd_lift16(const int16_t *values, long n, int64_t multiplier, uint64_t prime, uint64_t *out);
void cl_simd_lift32(const int32_t *values, long n, int64_t multiplier, uint64_t prime, uint64_t *out);

// The negacyclic number theoretic transform in place: values below four times the prime,
// below the prime and in bit-reversed order after. The prime is below 2^51, n is a power of two of at least
// 16; quotients[i] is floor(roots[i] * 2^52 / prime).
void cl_simd_transform(uint64_t *values, long n, const uint64_t *roots, const uint64_t *quotients, uint64_t prime);

// Its inverse: values below twice the prime, in bit-reversed order before. The first of
// the roots is 1/n, the others those of the inverse transform.
void cl_simd_inverse(uint64_t *values, long n, const uint64_t *roots, const uint64_t *quotients, uint64_t prime);

// What the transform of the conjugate-invariant ring does before the others of its stages:
// v[i] becomes v[i] - root * v[n - i] for 0 < i < n. Values are below twice the prime, and
// below four times it after.
void cl_simd_fold(uint64_t *values, long n, uint64_t root, uint64_t quotient, uint64_t prime);

// What its inverse does after the others: the same, and v[0] doubled. Values are below the
// prime, before and after.
void cl_simd_unfold(uint64_t *values, long n, uint64_t root, uint64_t quotient, uint64_t prime);

// low0 + 2^52 high0 += plain * c0 and low1 + 2^52 high1 += plain * c1, for count
// plaintexts (1 to 4) with a pair of polynomials each, n a multiple of 8, values below 2^52.
struct cl_simd_term { const uint64_t *plain, *c0, *c1; };
void cl_simd_accumulate(uint64_t *sums, long n, int count, struct cl_simd_term a, struct cl_simd_term b,
                        struct cl_simd_term c, struct cl_simd_term d);

// The sums of the products of at most 8 terms, divided by 2^52 and times a factor, modulo the
// prime; values are below the prime, inverse is 1/prime modulo 2^52, with any bits above.
struct cl_simd_terms { struct cl_simd_term term[8]; };
void cl_simd_product(struct cl_simd_terms terms, int count, long n, uint64_t inverse, uint64_t factor, uint64_t quotient,
                     uint64_t prime, uint64_t *out0, uint64_t *out1);

// What the sums stand for, low + 2^52 high, times factors[0] modulo the prime. factors[i]
// is 2^(52i) factors[0], quotients[i] is floor(factors[i] * 2^52 / prime).
void cl_simd_reduce(const uint64_t *sums, long n, const uint64_t *factors, const uint64_t *quotients, uint64_t prime,
                    uint64_t *out0, uint64_t *out1);

// Numbers modulo one prime, taken as their least absolute residues, modulo another: v + half,
// below "from" again, modulo "to", less rest, which is half modulo "to". Both primes are below
// 2^51; quotient is floor(2^52 / to).
void cl_simd_recenter(const uint64_t *values, long n, uint64_t from, uint64_t half, uint64_t to, uint64_t quotient,
                      uint64_t rest, uint64_t *out);

// (x - y) * factor modulo the prime, for x and y below it; quotient is floor(factor * 2^52 / prime).
void cl_simd_subtract_multiply(const uint64_t *x, const uint64_t *y, long n, uint64_t factor, uint64_t quotient,
                               uint64_t prime, uint64_t *out);

// x * factor, added to what is in out; all below the prime.
void cl_simd_multiply_add(const uint64_t *x, long n, uint64_t factor, uint64_t quotient, uint64_t prime, uint64_t *out);

// x + y modulo the prime, for x and y below it.
void cl_simd_add(const uint64_t *x, const uint64_t *y, long n, uint64_t prime, uint64_t *out);

// in[index[i]] for each i, and the same added to what is in out. Aligned blocks of 8 come from
// aligned blocks of 8, in any order within.
void cl_simd_permute(const uint64_t *in, long n, const uint64_t *index, uint64_t *out);
void cl_simd_add_permuted(const uint64_t *in, long n, const uint64_t *index, uint64_t prime, uint64_t *out);

// a0 b0, a0 b1 + a1 b0 and a1 b1 modulo the prime, which may take the place of factors. power
// is 2^52 modulo the prime, quotient is floor(power * 2^52 / prime), inverse is 1/prime modulo
// 2^52, with any bits above.
void cl_simd_tensor(const uint64_t *a0, const uint64_t *a1, const uint64_t *b0, const uint64_t *b1, long n, uint64_t power,
                    uint64_t quotient, uint64_t inverse, uint64_t prime, uint64_t *c0, uint64_t *c1, uint64_t *c2);

// Numbers modulo two primes p and q, x and y in place, as what they are sums of: a number
// n + h, below pq, is x q + y p less v pq, and v, 0 to 2, is written above the 52 bits of y.
// constants are p, h modulo p, 1/q modulo p and floor(2^52 (1/q modulo p) / p), then those
// of q. Both primes are below 2^51.
void cl_simd_split(uint64_t *x, uint64_t *y, long n, const uint64_t *constants);

// What was split, modulo another prime, below four times it. constants are q modulo the prime
// and floor(2^52 (q modulo the prime) / prime), those of p, and -h - v pq modulo the prime for
// v from 0 to 2.
void cl_simd_extend(const uint64_t *x, const uint64_t *y, long n, const uint64_t *constants, uint64_t prime, uint64_t *out);

#endif
