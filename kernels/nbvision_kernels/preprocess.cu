// The fused plan's frame: four output pixels a thread, wide stores. It only moves data; positions and samplers are the
// Python pixel functions of sampling.py, linked in through LTO.
//
// Compiled with -D: STORE_TYPE (0 u8, 1 f16, 2 f32), LAYOUT (0 NCHW, 1 NHWC) and the fields of regions.py.
// No header is included, so NVRTC needs no include directory.

extern "C" __device__ float nbv_position(int index, long long step, long long start, float unit, float scale);
extern "C" __device__ float nbv_sample(const unsigned char *pixels, long long origin, long long pitch, int pixel_bytes,
                                       int channel, int width, int height, float x, float y);

#if STORE_TYPE == 0
typedef unsigned char Stored;
__device__ __forceinline__ Stored to_stored(float value) {
    return (unsigned char)fminf(fmaxf(rintf(value), 0.0f), 255.0f);
}
#elif STORE_TYPE == 1
typedef unsigned short Stored;  // the bits of a half
__device__ __forceinline__ Stored to_stored(float value) {
    Stored half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#else
typedef float Stored;
__device__ __forceinline__ Stored to_stored(float value) { return value; }
#endif

// Where a multiprocessor holds 2,048 threads, more of them hide more latency than more registers save: 119 us against
// 141 us on sm_90. The others hold 1,536 at most and would spill.
constexpr int THREADS = 128;
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int MIN_BLOCKS = 12;
#else
constexpr int MIN_BLOCKS = 8;
#endif
constexpr int PIXELS = 4;  // a thread: 8-byte stores in half precision; docs/preprocess.md has the alternatives

struct alignas(PIXELS * sizeof(Stored)) Packed {
    Stored values[PIXELS];
};

__device__ __forceinline__ void store(Stored *to, const float *values) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) packed.values[i] = to_stored(values[i]);
    *reinterpret_cast<Packed *>(to) = packed;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    preprocess(const unsigned char *pixels, const long long *__restrict__ sources, const long long *__restrict__ regions,
               const float *__restrict__ scales, Stored *__restrict__ out, int height, int width, int pixel_bytes,
               int gray, int swap, float gain_0, float gain_1, float gain_2, float bias_0, float bias_1, float bias_2,
               float fill_0, float fill_1, float fill_2) {
    const int x_first = PIXELS * (blockIdx.x * blockDim.x + threadIdx.x);
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x_first >= width || y >= height) return;

    const long long *region = regions + (long long)blockIdx.z * REGION_FIELDS;
    const float *scale = scales + (long long)blockIdx.z * REGION_SCALES;
    const long long *source = sources + 4 * region[REGION_IMAGE];
    const long long pitch = source[1];
    const long long origin = source[0] + region[REGION_Y] * pitch + region[REGION_X] * pixel_bytes;
    const int region_width = (int)region[REGION_WIDTH], region_height = (int)region[REGION_HEIGHT];
    const int left = (int)region[REGION_LEFT], out_width = (int)region[REGION_OUT_WIDTH];
    const int line = y - (int)region[REGION_TOP];
    const bool line_inside = line >= 0 && line < (int)region[REGION_OUT_HEIGHT];
    const float source_y =
        nbv_position(line, region[REGION_STEP_Y], region[REGION_START_Y], scale[REGION_UNIT_Y], scale[REGION_SCALE_Y]);

    // Straight-line code over all pixels, fill chosen afterwards: the loads of four pixels are in flight together, and
    // what depends on the line alone is computed once. Samplers clamp, so a position outside the region is harmless.
    float values[3][PIXELS];
    if (line_inside && x_first < left + out_width && x_first + PIXELS > left) {
        float source_x[PIXELS];
#pragma unroll
        for (int i = 0; i < PIXELS; ++i)
            source_x[i] = nbv_position(x_first + i - left, region[REGION_STEP_X], region[REGION_START_X],
                                       scale[REGION_UNIT_X], scale[REGION_SCALE_X]);
        if (gray) {
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
                values[0][i] = values[1][i] = values[2][i] = nbv_sample(
                    pixels, origin, pitch, pixel_bytes, 0, region_width, region_height, source_x[i], source_y);
        } else {
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
#pragma unroll
                for (int c = 0; c < 3; ++c)  // a constant, so that the loads of a pixel share one address
                    values[c][i] = nbv_sample(pixels, origin, pitch, pixel_bytes, c, region_width, region_height,
                                              source_x[i], source_y);
        }
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) {
            const int column = x_first + i - left;
            const bool inside = column >= 0 && column < out_width;
            const float first = swap ? values[2][i] : values[0][i], third = swap ? values[0][i] : values[2][i];
            values[0][i] = inside ? first : fill_0;
            values[1][i] = inside ? values[1][i] : fill_1;
            values[2][i] = inside ? third : fill_2;
        }
    } else {
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) {
            values[0][i] = fill_0;
            values[1][i] = fill_1;
            values[2][i] = fill_2;
        }
    }
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
        values[0][i] = values[0][i] * gain_0 + bias_0;
        values[1][i] = values[1][i] * gain_1 + bias_1;
        values[2][i] = values[2][i] * gain_2 + bias_2;
    }

    const long long plane = (long long)height * width;
    Stored *canvas = out + (long long)blockIdx.z * 3 * plane;
    const long long pixel = (long long)y * width + x_first;
    // Every line starts on a wide boundary when the width is a multiple of PIXELS and `out` itself is aligned.
    const bool wide = width % PIXELS == 0 && (unsigned long long)out % sizeof(Packed) == 0;
#if LAYOUT == 0
    if (wide) {
#pragma unroll
        for (int c = 0; c < 3; ++c) store(canvas + c * plane + pixel, values[c]);
    } else {
#pragma unroll
        for (int c = 0; c < 3; ++c)
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
                if (x_first + i < width) canvas[c * plane + pixel + i] = to_stored(values[c][i]);
    }
#else
    float line_values[3 * PIXELS];
#pragma unroll
    for (int i = 0; i < 3 * PIXELS; ++i) line_values[i] = values[i % 3][i / 3];
    if (wide) {
#pragma unroll
        for (int k = 0; k < 3; ++k) store(canvas + 3 * pixel + PIXELS * k, line_values + PIXELS * k);
    } else {
#pragma unroll
        for (int i = 0; i < 3 * PIXELS; ++i)
            if (x_first + i / 3 < width) canvas[3 * pixel + i] = to_stored(line_values[i]);
    }
#endif
}
