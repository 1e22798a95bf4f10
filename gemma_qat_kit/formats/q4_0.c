// Q4_0 on a CPU: the rules of q4_0.py, group by group, without a tensor in between. Built and called by native.py.
//
// Every function works on `num_groups` groups of 32 and may run on any part of a tensor, so threads share one by rows.
// Compiled with -ffp-contract=off: a fused multiply-add would round differently from ggml's reference.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
static inline uint16_t half_bits(float x) { return (uint16_t)_cvtss_sh(x, 0); }
static inline float half_value(uint16_t h) { return _cvtsh_ss(h); }
#elif defined(__aarch64__)
static inline uint16_t half_bits(float x) { __fp16 h = (__fp16)x; uint16_t b; memcpy(&b, &h, 2); return b; }
static inline float half_value(uint16_t b) { __fp16 h; memcpy(&h, &b, 2); return (float)h; }
#else
#error "this compiler has no float16 conversion here; q4_0.py does without"
#endif

#define G 32            // weights in a group
#define GROUP_BYTES 18  // a float16 scale and 32 nibbles
#define ALWAYS static inline __attribute__((always_inline))
#define VECTOR _Pragma("omp simd")

enum { FLOAT32, FLOAT16, BFLOAT16 };

ALWAYS uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
ALWAYS float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

ALWAYS float to_bfloat16(float x) {  // to nearest, ties to even; x is finite
    uint32_t b = bits_of(x);
    return float_of((b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u);
}

ALWAYS void load(const void *x, int dtype, int64_t group, float *v) {
    if (dtype == FLOAT32) {
        memcpy(v, (const float *)x + group * G, G * 4);
    } else if (dtype == FLOAT16) {
        const uint16_t *h = (const uint16_t *)x + group * G;
        for (int i = 0; i < G; i++) v[i] = half_value(h[i]);
    } else {
        const uint16_t *h = (const uint16_t *)x + group * G;
        VECTOR for (int i = 0; i < G; i++) v[i] = float_of((uint32_t)h[i] << 16);
    }
}

ALWAYS void store(void *x, int dtype, int64_t group, const float *v) {
    if (dtype == FLOAT32) {
        memcpy((float *)x + group * G, v, G * 4);
    } else if (dtype == FLOAT16) {
        uint16_t *h = (uint16_t *)x + group * G;
        for (int i = 0; i < G; i++) h[i] = half_bits(v[i]);
    } else {
        uint16_t *h = (uint16_t *)x + group * G;
        VECTOR for (int i = 0; i < G; i++) h[i] = (uint16_t)(bits_of(to_bfloat16(v[i])) >> 16);
    }
}

// The first value of largest magnitude, with its sign. *is_usable is cleared by a NaN, and by a value so large that its
// scale would be an infinity in float16.
ALWAYS float extremum(const float *v, int *is_usable) {
    int32_t largest = 0, first = G;
    _Pragma("omp simd reduction(max : largest)") for (int i = 0; i < G; i++) {
        int32_t a = (int32_t)(bits_of(v[i]) & 0x7fffffff);
        largest = a > largest ? a : largest;
    }
    if (largest >= 0x48fff000) *is_usable = 0;  // 8 * 65520
    _Pragma("omp simd reduction(min : first)") for (int i = 0; i < G; i++) {
        int32_t at = (int32_t)(bits_of(v[i]) & 0x7fffffff) == largest ? i : G;
        first = at < first ? at : first;
    }
    return v[first] + 0.0f;  // never -0.0, as in ggml
}

// ggml's rule. Codes are 0..15; the scale that codes are made with is not yet rounded to float16.
ALWAYS float plain_codes(const float *v, float extreme, int32_t *code) {
    float scale = extreme / -8, inverse = scale ? 1 / scale : 0;
    if (isinf(inverse)) {  // a scale this small is zero in float16
        for (int i = 0; i < G; i++) code[i] = 0;
        return scale;
    }
    VECTOR for (int i = 0; i < G; i++) {
        int32_t q = (int32_t)(v[i] * inverse + 8.5f);
        code[i] = q > 15 ? 15 : q;
    }
    return scale;
}

ALWAYS void pack(uint16_t scale, const int32_t *code, uint8_t *block) {
    memcpy(block, &scale, 2);
    VECTOR for (int i = 0; i < G / 2; i++) block[2 + i] = (uint8_t)(code[i] | code[i + G / 2] << 4);
}

ALWAYS int64_t quantize_as(const void *x, int dtype, int64_t num_groups, uint8_t *blocks) {
    for (int64_t g = 0; g < num_groups; g++) {
        float v[G];
        int32_t code[G];
        int is_usable = 1;
        load(x, dtype, g, v);
        float extreme = extremum(v, &is_usable);
        if (!is_usable) return g;
        float scale = plain_codes(v, extreme, code);
        pack(half_bits(scale), code, blocks + g * GROUP_BYTES);
    }
    return -1;
}

ALWAYS int64_t fake_quantize_as(const void *x, int dtype, int64_t num_groups, void *out) {
    for (int64_t g = 0; g < num_groups; g++) {
        float v[G];
        int32_t code[G];
        int is_usable = 1;
        load(x, dtype, g, v);
        float extreme = extremum(v, &is_usable);
        if (!is_usable) return g;
        float scale = half_value(half_bits(plain_codes(v, extreme, code)));
        VECTOR for (int i = 0; i < G; i++) v[i] = (float)(code[i] - 8) * scale;
        store(out, dtype, g, v);
    }
    return -1;
}

ALWAYS int64_t dequantize_as(const uint8_t *blocks, int dtype, int64_t num_groups, void *out) {
    for (int64_t g = 0; g < num_groups; g++) {
        const uint8_t *block = blocks + g * GROUP_BYTES;
        uint16_t half;
        float v[G];
        memcpy(&half, block, 2);
        float scale = half_value(half);
        VECTOR for (int i = 0; i < G / 2; i++) {
            v[i] = (float)((block[2 + i] & 15) - 8) * scale;
            v[i + G / 2] = (float)((block[2 + i] >> 4) - 8) * scale;
        }
        store(out, dtype, g, v);
    }
    return -1;
}

// ---------------------------------------------------------------------------------------------- grid recovery

typedef struct {
    int64_t num_groups, on_grid, groups_exact, values_exact, naive_groups_exact, naive_values_exact, peaks[8];
    double worst_error;
} Fit;

ALWAYS float rounded(float x, int precision) {
    return precision == BFLOAT16 ? to_bfloat16(x) : precision == FLOAT16 ? half_value(half_bits(x)) : x;
}

ALWAYS int count_exact(const float *v, const int32_t *code, float scale, int precision) {
    int32_t count = 0;
    _Pragma("omp simd reduction(+ : count)") for (int i = 0; i < G; i++)
        count += rounded((float)(code[i] - 8) * scale, precision) == v[i];
    return count;
}

ALWAYS float largest_error(const float *v, const int32_t *code, float scale) {
    float worst = 0;
    _Pragma("omp simd reduction(max : worst)") for (int i = 0; i < G; i++) {
        float e = fabsf((float)(code[i] - 8) * scale - v[i]);
        worst = e > worst ? e : worst;
    }
    return worst;
}

// Whether steps of extreme/-level pass through every value, each of which may be off by `halves` halves of a unit in
// its last place (`unit` is a half, relative), as may the extremum, and with it the step.
ALWAYS int fits(const float *v, float extreme, int level, float unit, float halves) {
    const float step = extreme / (float)-level, inverse = (float)-level / extreme, shared = unit * fabsf(step);
    for (int part = 0; part < G; part += G / 2) {  // most levels fail in the first half
        int32_t misses = 0;
        _Pragma("omp simd reduction(| : misses)") for (int i = part; i < part + G / 2; i++) {
            float q = rintf(v[i] * inverse);
            q = q > 7 ? 7 : q;
            misses |= fabsf(q * step - v[i]) > halves * (unit * fabsf(v[i]) + fabsf(q) * shared);
        }
        if (misses) return 0;
    }
    return 1;
}

// The smallest peak level whose steps pass through every value, 0 where none does. Published weights are off by up to
// three halves of a unit, so a level that fits within three is taken where none fits within one.
ALWAYS int peak_level(const float *v, float extreme, float unit) {
    int32_t misses[8] = {0};
    for (int i = 0; i < 8; i++) {  // a few values tell most levels apart: one vector holds all eight of them
        VECTOR for (int k = 0; k < 8; k++) {
            float step = extreme / (float)(-1 - k), q = rintf(v[i] * ((float)(-1 - k) / extreme));
            q = q > 7 ? 7 : q;
            misses[k] |= fabsf(q * step - v[i]) > 3 * (unit * fabsf(v[i]) + fabsf(q) * (unit * fabsf(step)));
        }
    }
    int loose = 0;
    for (int level = 1; level <= 8; level++) {
        if (misses[level - 1] || !fits(v, extreme, level, unit, 3)) continue;
        if (fits(v, extreme, level, unit, 1)) return level;
        if (!loose) loose = level;
    }
    return loose;
}

// The float16 number nearest to the least-squares step. The sums are exact in double, so their order does not matter.
ALWAYS uint16_t least_squares(const float *v, const int32_t *code) {
    double qv = 0, qq = 0;
    _Pragma("omp simd reduction(+ : qv, qq)") for (int i = 0; i < G; i++) {
        double q = code[i] - 8;
        qv += q * v[i];
        qq += q * q;
    }
    return half_bits((float)(qv / qq));
}

// The float16 scale under which most values come out as they are stored: one of the neighbours of extreme/-level among
// the bfloat16 numbers (a step that was one is then found exactly), or of the least-squares step among float16's.
ALWAYS uint16_t best_scale(const float *v, const int32_t *code, float extreme, int level, int precision, int *exact) {
    static const int near[3] = {0, 1, -1};
    uint32_t step = bits_of(to_bfloat16(extreme / (float)-level));
    uint16_t fitted = 0, best = 0;
    float best_error = 0;
    *exact = -1;
    for (int i = 0; i < 6; i++) {
        if (i == 3) fitted = least_squares(v, code);
        uint16_t candidate =
            i < 3 ? half_bits(float_of(step + (uint32_t)near[i] * 0x10000u)) : (uint16_t)(fitted + near[i - 3]);
        float scale = half_value(candidate);
        int count = count_exact(v, code, scale, precision);
        if (count == G) return *exact = G, candidate;
        if (count < *exact) continue;
        float error = largest_error(v, code, scale);
        if (count > *exact || error < best_error) best = candidate, best_error = error, *exact = count;
    }
    return best;
}

ALWAYS void recover_group(const float *v, float extreme, int precision, uint8_t *block, Fit *fit) {
    const float unit = precision == BFLOAT16 ? 0x1p-8f : precision == FLOAT16 ? 0x1p-11f : 0x1p-22f;
    int32_t code[G];
    uint16_t half = half_bits(plain_codes(v, extreme, code));
    int exact = count_exact(v, code, half_value(half), precision);
    fit->naive_values_exact += exact;
    fit->naive_groups_exact += exact == G;
    int is_zero = fabsf(extreme) < 1e-30f;  // in float16 the scale is zero, and so is every value
    int level = is_zero ? 8 : peak_level(v, extreme, unit);
    if (level && !is_zero) {
        float inverse = (float)-level / extreme;
        VECTOR for (int i = 0; i < G; i++) code[i] = (int32_t)rintf(v[i] * inverse) + 8;
        half = best_scale(v, code, extreme, level, precision, &exact);
    }
    if (level) fit->on_grid++, fit->peaks[level - 1]++;
    fit->values_exact += exact;
    fit->groups_exact += exact == G;
    if (extreme) {
        double error = largest_error(v, code, half_value(half)) / fabsf(extreme);
        if (error > fit->worst_error) fit->worst_error = error;
    }
    pack(half, code, block);
}

// The narrowest type that holds all values of a group: float32 weights are often 16-bit ones that were widened.
ALWAYS int narrowest(const float *v) {
    uint32_t low = 0;
    int32_t wider = 0;
    _Pragma("omp simd reduction(| : low)") for (int i = 0; i < G; i++) low |= bits_of(v[i]) & 0xffff;
    if (!low) return BFLOAT16;
    for (int i = 0; i < G && !wider; i++) wider = half_value(half_bits(v[i])) != v[i];
    return wider ? FLOAT32 : FLOAT16;
}

ALWAYS int64_t recover_as(const void *x, int dtype, int64_t num_groups, uint8_t *blocks, Fit *fit) {
    fit->num_groups += num_groups;
    for (int64_t g = 0; g < num_groups; g++) {
        float v[G];
        int is_usable = 1;
        load(x, dtype, g, v);
        float extreme = extremum(v, &is_usable);
        if (!is_usable) return g;
        uint8_t *block = blocks + g * GROUP_BYTES;
        int precision = dtype == FLOAT32 ? narrowest(v) : dtype;
        if (precision == BFLOAT16) recover_group(v, extreme, BFLOAT16, block, fit);
        else if (precision == FLOAT16) recover_group(v, extreme, FLOAT16, block, fit);
        else recover_group(v, extreme, FLOAT32, block, fit);
    }
    return -1;
}

// ------------------------------------------------------------------------------------------ importance matrix

// llama.cpp's search (quantize_row_q4_0_impl): 19 scales, the one that loses least of the weighted energy.
ALWAYS float search_scale(const float *v, const float *w, float extreme, int32_t *code) {
    float best = 0, scale = 0;
    for (int i = 0; i < G; i++) code[i] = 8;
    if (fabsf(extreme) < 1e-15f) {
        for (int i = 0; i < G; i++) code[i] = 0;
        return 0;
    }
    for (int trial = 0; trial < 19; trial++) {
        int shift = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9;  // the plain scale first, then -9..9 tenths
        float inverse = shift ? -(8 + 0.1f * shift) / extreme : -8 / extreme, wvq = 0, wqq = 0, q[G];
        VECTOR for (int i = 0; i < G; i++) {
            float r = rintf(inverse * v[i]);
            q[i] = r < -8 ? -8 : r > 7 ? 7 : r;
        }
        for (int i = 0; i < G; i++) {  // in ggml's order, which decides the last bits
            wvq += w[i] * v[i] * q[i];
            wqq += w[i] * q[i] * q[i];
        }
        if (trial ? wqq > 0 && wvq * wvq > best * wqq : 1) {
            VECTOR for (int i = 0; i < G; i++) code[i] = (int32_t)q[i] + 8;
            scale = wqq ? wvq / wqq : 0;
            best = scale * wvq;
        }
    }
    return scale;
}

ALWAYS int64_t importance_as(const void *x, int dtype, int64_t groups_per_row, int64_t num_groups,
                             const float *importance, uint8_t *blocks) {
    for (int64_t row = 0; row < num_groups; row += groups_per_row) {
        float v[G], w[G], squares = 0;
        int32_t code[G];
        int is_usable = 1;
        for (int64_t g = row; g < row + groups_per_row; g++) {
            load(x, dtype, g, v);
            for (int i = 0; i < G; i++) squares += v[i] * v[i];
            extremum(v, &is_usable);
            if (!is_usable) return g;
        }
        const float mean_square = squares / (float)(groups_per_row * G);
        for (int64_t g = row; g < row + groups_per_row; g++) {
            load(x, dtype, g, v);
            const float *m = importance + (g - row) * G;
            VECTOR for (int i = 0; i < G; i++) w[i] = m[i] * sqrtf(mean_square + v[i] * v[i]);
            float scale = search_scale(v, w, extremum(v, &is_usable), code);
            pack(half_bits(scale), code, blocks + g * GROUP_BYTES);
        }
    }
    return -1;
}

// One loop is compiled for each dtype. All return the first group that no scale can be found for, or -1.
#define FOR_DTYPE(call) \
    return dtype == FLOAT32 ? call(FLOAT32) : dtype == FLOAT16 ? call(FLOAT16) : call(BFLOAT16)

int64_t q4_0_quantize(const void *x, int dtype, int64_t num_groups, uint8_t *blocks) {
#define CALL(D) quantize_as(x, D, num_groups, blocks)
    FOR_DTYPE(CALL);
#undef CALL
}

int64_t q4_0_fake_quantize(const void *x, int dtype, int64_t num_groups, void *out) {
#define CALL(D) fake_quantize_as(x, D, num_groups, out)
    FOR_DTYPE(CALL);
#undef CALL
}

int64_t q4_0_dequantize(const uint8_t *blocks, int dtype, int64_t num_groups, void *out) {
#define CALL(D) dequantize_as(blocks, D, num_groups, out)
    FOR_DTYPE(CALL);
#undef CALL
}

int64_t q4_0_recover(const void *x, int dtype, int64_t num_groups, uint8_t *blocks, Fit *fit) {
#define CALL(D) recover_as(x, D, num_groups, blocks, fit)
    FOR_DTYPE(CALL);
#undef CALL
}

int64_t q4_0_importance(const void *x, int dtype, int64_t groups_per_row, const float *importance, int64_t num_groups,
                        uint8_t *blocks) {
#define CALL(D) importance_as(x, D, groups_per_row, num_groups, importance, blocks)
    FOR_DTYPE(CALL);
#undef CALL
}
