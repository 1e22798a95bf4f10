// Fake quantization with a scale that is trained beside the weights, on a CPU: grids.py, a group at a time, without a
// tensor in between. Built and called by native.py. The arithmetic is torch's, operation by operation.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
static inline float rounded_to_half(float x) { return _cvtsh_ss((uint16_t)_cvtss_sh(x, 0)); }
#elif defined(__aarch64__)
static inline float rounded_to_half(float x) { return (float)(__fp16)x; }
#else
#error "this compiler has no float16 conversion here; grids.py does without"
#endif

static inline float step_of(float scale, int is_half) { return is_half ? rounded_to_half(scale) : scale; }

// out = clamp(round(w / s), low, high) * s, halves to even; a group whose step is zero becomes zeros.
int64_t learned_forward(const float *w, const float *scale, int is_half, int low, int high, int64_t group_size,
                        int64_t num_groups, float *out) {
    const float least = (float)low, most = (float)high;
    for (int64_t g = 0; g < num_groups; g++, w += group_size, out += group_size) {
        const float s = step_of(scale[g], is_half);
        if (s == 0) {
            memset(out, 0, (size_t)group_size * sizeof(float));
            continue;
        }
        _Pragma("omp simd") for (int64_t i = 0; i < group_size; i++) {
            float q = rintf(w[i] / s);
            q = q < least ? least : q > most ? most : q;
            out[i] = q * s;
        }
    }
    return -1;
}

// The gradient of what is inside the range goes straight through; that of the scale is learned step size
// quantization's: sum of g * (q - w / s) inside the range and of g * q outside.
int64_t learned_backward(const float *w, const float *scale, const float *gradient, int is_half, int low, int high,
                         int64_t group_size, int64_t num_groups, float *of_weight, float *of_scale) {
    const float least = (float)low, most = (float)high;
    for (int64_t g = 0; g < num_groups; g++, w += group_size, gradient += group_size, of_weight += group_size) {
        const float s = step_of(scale[g], is_half);
        float sum = 0;
        if (s == 0) {
            memcpy(of_weight, gradient, (size_t)group_size * sizeof(float));
            of_scale[g] = 0;
            continue;
        }
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < group_size; i++) {
            const float v = w[i] / s, q = rintf(v);
            const float below = q < least, above = q > most, inside = 1 - below - above;
            of_weight[i] = inside * gradient[i];
            sum += gradient[i] * (inside * (q - v) + below * least + above * most);
        }
        of_scale[g] = sum;
    }
    return -1;
}
