// The fused plan's frame: wide loads, wide stores, four pixels side by side in each of several lines a thread. It only
// moves data; taps and values are the Python pixel functions of sampling.py, linked in through LTO.
//
// Compiled with -D: STORE_TYPE (0 u8, 1 f16, 2 f32), LAYOUT (0 NCHW, 1 NHWC), PAIRS (whether a sampler reads two
// neighbouring columns), WEIGHT (0 int, 1 float), LINES and MIN_BLOCKS, and the fields of regions.py.
// No header is included, so NVRTC needs no include directory.

#if WEIGHT == 0
typedef int Weight;
#else
typedef float Weight;
#endif

extern "C" __device__ void nbv_along_x(int index, long long step, long long start, float unit, int length, int *taps,
                                       Weight *weights);
extern "C" __device__ void nbv_along_y(int index, long long step, long long start, float unit, int length, int *taps,
                                       Weight *weights);
extern "C" __device__ float nbv_blend(const int *pixels, const Weight *weights_x, const Weight *weights_y);

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

constexpr int THREADS = 128;
// A multiprocessor that holds 2,048 threads takes MIN_BLOCKS; with as many the others would spill.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int BLOCKS = MIN_BLOCKS;
#else
constexpr int BLOCKS = MIN_BLOCKS - 1;
#endif
constexpr int PIXELS = 4;  // side by side: 8-byte stores in half precision; docs/preprocess.md has the alternatives

struct alignas(16) Source {
    unsigned long long address;
    long long pitch;
};
struct alignas(16) Row {
    int fields[REGION_FIELDS];
};
struct alignas(16) Steps {
    long long step_x, start_x, step_y, start_y;
};
struct alignas(PIXELS * sizeof(Stored)) Packed {
    Stored values[PIXELS];
};

__device__ __forceinline__ void store(Stored *to, const float *values) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) packed.values[i] = to_stored(values[i]);
    *reinterpret_cast<Packed *>(to) = packed;
}

// Up to eight bytes from `at`, `count` of them needed, by aligned words: three loads where bytes would be six. No word
// without a needed byte is touched, so nothing outside the allocation is.
__device__ __forceinline__ void load_bytes(const unsigned char *at, int count, unsigned &low, unsigned &high) {
    const unsigned long long address = reinterpret_cast<unsigned long long>(at);
    const char *aligned = reinterpret_cast<const char *>(address & ~3ull);
    const int shift = (int)(address & 3), last = (shift + count - 1) & ~3;
    const unsigned word_0 = __ldg(reinterpret_cast<const unsigned *>(aligned));
    const unsigned word_1 = __ldg(reinterpret_cast<const unsigned *>(aligned + min(4, last)));
    const unsigned word_2 = __ldg(reinterpret_cast<const unsigned *>(aligned + last));
    low = __funnelshift_r(word_0, word_1, 8 * shift);
    high = __funnelshift_r(word_1, word_2, 8 * shift);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    preprocess(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
               const long long *__restrict__ steps, const float *__restrict__ scales, Stored *__restrict__ out,
               int height, int width, int pixel_bytes, int gray, int swap, float gain_0, float gain_1, float gain_2,
               float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2) {
    const int x_first = PIXELS * (blockIdx.x * blockDim.x + threadIdx.x);
    if (x_first >= width) return;

    const Row row = reinterpret_cast<const Row *>(regions)[blockIdx.z];
    const Steps step = reinterpret_cast<const Steps *>(steps)[blockIdx.z];
    const float *scale = scales + (long long)blockIdx.z * REGION_SCALES;
    // A row of the source table is address, pitch, height, width.
    const Source source = reinterpret_cast<const Source *>(sources)[2 * row.fields[REGION_IMAGE]];
    const int left = row.fields[REGION_LEFT], out_width = row.fields[REGION_OUT_WIDTH];
    const int region_width = row.fields[REGION_WIDTH], region_height = row.fields[REGION_HEIGHT];
    const unsigned char *origin = pixels + source.address + row.fields[REGION_Y] * source.pitch +
                                  (long long)(row.fields[REGION_X] * pixel_bytes);
    const bool some_inside = x_first < left + out_width && x_first + PIXELS > left;

    // What depends on the column alone serves all lines. Taps are clamped to the region, so those of columns outside it
    // are harmless, and the loads of four pixels are in flight together.
    int columns[PIXELS][2];
    Weight weights_x[PIXELS][2];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i)
        nbv_along_x(x_first + i - left, step.step_x, step.start_x, scale[REGION_UNIT_X], region_width, columns[i],
                    weights_x[i]);

    const long long plane = (long long)height * width;
    Stored *canvas = out + (long long)blockIdx.z * 3 * plane;
    // Every line starts on a wide boundary when the width is a multiple of PIXELS and `out` itself is aligned.
    const bool wide = width % PIXELS == 0 && (unsigned long long)out % sizeof(Packed) == 0;
    int y = blockIdx.y * (LINES * blockDim.y) + threadIdx.y;
#pragma unroll
    for (int l = 0; l < LINES; ++l, y += blockDim.y) {
        if (y >= height) return;
        const int line = y - row.fields[REGION_TOP];
        float values[3][PIXELS];
        if (some_inside && line >= 0 && line < row.fields[REGION_OUT_HEIGHT]) {
            int lines[2];
            Weight weights_y[2];
            nbv_along_y(line, step.step_y, step.start_y, scale[REGION_UNIT_Y], region_height, lines, weights_y);
            const unsigned char *above = origin + lines[0] * source.pitch, *below = origin + lines[1] * source.pitch;
#if PAIRS
            const int pair_bytes = pixel_bytes * min(2, region_width);
            unsigned above_low[PIXELS], above_high[PIXELS], below_low[PIXELS], below_high[PIXELS];
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                const int at = pixel_bytes * max(min(columns[i][0], region_width - 2), 0);
                load_bytes(above + at, pair_bytes, above_low[i], above_high[i]);
                load_bytes(below + at, pair_bytes, below_low[i], below_high[i]);
            }
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                // The pair is the region's last two columns where both taps are the last, or its only column.
                const bool second_alone = columns[i][0] > max(region_width - 2, 0);
                const unsigned above_right = __funnelshift_rc(above_low[i], above_high[i], 8 * pixel_bytes);
                const unsigned below_right = __funnelshift_rc(below_low[i], below_high[i], 8 * pixel_bytes);
                const unsigned above_left = second_alone ? above_right : above_low[i];
                const unsigned below_left = second_alone ? below_right : below_low[i];
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    const int taps[4] = {(int)(above_left >> 8 * c & 255), (int)(above_right >> 8 * c & 255),
                                         (int)(below_left >> 8 * c & 255), (int)(below_right >> 8 * c & 255)};
                    values[c][i] = nbv_blend(taps, weights_x[i], weights_y);
                }
            }
#else
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    const int pixel = above[pixel_bytes * columns[i][0] + (gray ? 0 : c)];
                    const int taps[4] = {pixel, pixel, pixel, pixel};
                    values[c][i] = nbv_blend(taps, weights_x[i], weights_y);
                }
#endif
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                const int column = x_first + i - left;
                const bool inside = column >= 0 && column < out_width;
                const float second = gray ? values[0][i] : values[1][i], third = gray ? values[0][i] : values[2][i];
                const float first = values[0][i];
                values[0][i] = inside ? (swap ? third : first) : fill_0;
                values[1][i] = inside ? second : fill_1;
                values[2][i] = inside ? (swap ? first : third) : fill_2;
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

        const long long pixel = (long long)y * width + x_first;
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
}
