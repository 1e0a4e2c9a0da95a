// What the frames share: the type that is stored, the channels of a canvas, and the chain of pixel functions.
//
// Compiled with -D: STORE_TYPE (0 u8, 1 f16, 2 f32, 4 i8, 5 bf16), LAYOUT (0 NCHW, 1 NHWC, 2 NHWC with a fourth channel of
// zeros, 3 the first channel alone), and for a chain CHAIN, CHAIN_PARAMETERS and CHAIN_NUMBERS.

#if STORE_TYPE == 0
typedef unsigned char Stored;
__device__ __forceinline__ Stored to_stored(float value) {
    // 2^23 leaves a float no bits for fractions: the sum rounds to even, and its last byte is the integer.
    return (unsigned char)__float_as_uint(fminf(fmaxf(value, 0.0f), 255.0f) + 8388608.0f);
}
#elif STORE_TYPE == 1
typedef unsigned short Stored;  // the bits of a half
__device__ __forceinline__ Stored to_stored(float value) {
    Stored half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned to_stored(float first, float second) {
    unsigned halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
    return halves;
}
#endif
#elif STORE_TYPE == 4
typedef signed char Stored;
__device__ __forceinline__ Stored to_stored(float value) {
    return (signed char)__float_as_uint(fminf(fmaxf(value, -128.0f), 127.0f) + 12582912.0f);  // 1.5 * 2^23, likewise
}
#elif STORE_TYPE == 5
typedef unsigned short Stored;  // the upper half of a float, rounded
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned to_stored(float first, float second) {
    unsigned halves;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
    return halves;
}
__device__ __forceinline__ Stored to_stored(float value) { return (Stored)to_stored(value, value); }
#else
__device__ __forceinline__ Stored to_stored(float value) {
    const unsigned bits = __float_as_uint(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif
#else
typedef float Stored;
__device__ __forceinline__ Stored to_stored(float value) { return value; }
#endif

#define OUT_CHANNELS (LAYOUT == 2 ? 4 : LAYOUT == 3 ? 1 : 3)

#ifdef CHAIN
extern "C" __device__ void nbv_shade(float *rgb, float x, float y, const float *numbers);
#else
#define CHAIN_PARAMETERS
#endif

struct alignas(16) Source {  // the first half of a row of the batch's table
    unsigned long long address;
    long long pitch;
};

// Gain and bias in the order of the source's channels, and whether the output's is the reverse.
struct Shading {
    float gain[3], bias[3];
    int swap;
};

// Normalises one pixel and stores it; values are in the order of the source's channels.
__device__ __forceinline__ void store_pixel(Stored *canvas, long long plane, long long pixel, const float *values,
                                            const Shading &shading) {
    const Stored first = to_stored(values[0] * shading.gain[0] + shading.bias[0]);
    const Stored second = to_stored(values[1] * shading.gain[1] + shading.bias[1]);
    const Stored third = to_stored(values[2] * shading.gain[2] + shading.bias[2]);
#if LAYOUT == 0
    canvas[(shading.swap ? 2 * plane : 0) + pixel] = first;
    canvas[plane + pixel] = second;
    canvas[(shading.swap ? 0 : 2 * plane) + pixel] = third;
#elif LAYOUT == 3
    canvas[pixel] = first;
#else
    canvas[OUT_CHANNELS * pixel] = shading.swap ? third : first;
    canvas[OUT_CHANNELS * pixel + 1] = second;
    canvas[OUT_CHANNELS * pixel + 2] = shading.swap ? first : third;
#if OUT_CHANNELS == 4
    canvas[OUT_CHANNELS * pixel + 3] = to_stored(0.0f);
#endif
#endif
}

#ifdef CHAIN
// The chain on one pixel; `bgr` says that the first channel is blue.
__device__ __forceinline__ void shade_pixel(float *values, int x, int y, int bgr, const float *numbers) {
    float rgb[3] = {bgr ? values[2] : values[0], values[1], bgr ? values[0] : values[2]};
    nbv_shade(rgb, (float)x, (float)y, numbers);
    values[0] = bgr ? rgb[2] : rgb[0];
    values[1] = rgb[1];
    values[2] = bgr ? rgb[0] : rgb[2];
}
#endif
