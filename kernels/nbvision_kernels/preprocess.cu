// The fused plan's frame: wide loads, wide stores, four pixels side by side in each of several lines a thread. It only
// moves data; taps and values are the Python pixel functions of sampling.py, linked in through LTO.
//
// Compiled with -D: SOURCE (0 bytes side by side, 1 planes of bytes, 2 halves, 3 floats, 4 NV12), PIXEL_BYTES of the
// source (of planes and NV12 1), GRAY (whether that is one channel), PAIRS (whether the sampler reads two neighbouring
// columns), WEIGHT (0 int, 1 float), LINES and MIN_BLOCKS, the fields of regions.py, and those of frame.cuh.
// No header of CUDA is included, so NVRTC needs no include directory.
#include "frame.cuh"

#if WEIGHT == 0
typedef int Weight;
#else
typedef float Weight;
#endif

#define NV12 (SOURCE == 4)
#define PLANES (SOURCE == 1 ? 3 : 1)
#if SOURCE == 2 || SOURCE == 3
typedef float Pixel;
#else
typedef int Pixel;
#endif

extern "C" __device__ void nbv_along_x(int index, long long step, long long start, float unit, int length, int *taps,
                                       Weight *weights);
extern "C" __device__ void nbv_along_y(int index, long long step, long long start, float unit, int length, int *taps,
                                       Weight *weights);
extern "C" __device__ float nbv_blend(const Pixel *pixels, const Weight *weights_x, const Weight *weights_y);
#if NV12
extern "C" __device__ void nbv_convert(const Weight *yuv, const Weight *matrix, Weight *rgb);
#define MATRIX_PARAMETERS \
    , Weight luma_zero, Weight luma_gain, Weight v_to_r, Weight u_to_g, Weight v_to_g, Weight u_to_b
#else
#define MATRIX_PARAMETERS
#endif

#define COLORS (GRAY ? 1 : 3)  // alpha is dropped
#define CHANNELS (COLORS / PLANES)  // side by side
constexpr int THREADS = 128;
// A multiprocessor that holds 2,048 threads takes MIN_BLOCKS; with as many the others would spill registers.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int BLOCKS = MIN_BLOCKS;
#else
constexpr int BLOCKS = MIN_BLOCKS - 1;
#endif
constexpr int PIXELS = 4;  // side by side: 8-byte stores in half precision; docs/preprocess.md has the alternatives

struct alignas(16) Row {
    int fields[REGION_FIELDS];
};
struct alignas(16) Steps {
    long long step_x, start_x, step_y, start_y;
};
#if SOURCE == 2
__device__ __forceinline__ float element(const unsigned char *at) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(__ldg(reinterpret_cast<const unsigned short *>(at))));
    return value;
}
#elif SOURCE == 3
__device__ __forceinline__ float element(const unsigned char *at) { return __ldg(reinterpret_cast<const float *>(at)); }
#endif
struct alignas(PIXELS * sizeof(Stored)) Packed {
    Stored values[PIXELS];
};

__device__ __forceinline__ void store(Stored *to, const float *values) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) packed.values[i] = to_stored(values[i]);
    *reinterpret_cast<Packed *>(to) = packed;
}

// Two neighbouring pixels of a line, by aligned words: three loads where bytes would be six. No word without a byte of
// the pair is touched, so nothing outside the allocation is.
__device__ __forceinline__ void load_pair(const unsigned char *at, unsigned &low, unsigned &high) {
    const unsigned long long address = reinterpret_cast<unsigned long long>(at);
    const unsigned *word = reinterpret_cast<const unsigned *>(address & ~3ull);
    const unsigned *last = reinterpret_cast<const unsigned *>((address + 2 * PIXEL_BYTES - 1) & ~3ull);
    const int shift = 8 * ((int)address & 3);
    const unsigned word_0 = __ldg(word), word_1 = __ldg(PIXEL_BYTES == 1 ? last : word + 1);
    low = __funnelshift_r(word_0, word_1, shift);
    high = PIXEL_BYTES == 1 ? 0 : __funnelshift_r(word_1, __ldg(last), shift);
}

// Channel c of the pair's first (k = 0) or second pixel.
template <int k, int c>
__device__ __forceinline__ int pair_byte(unsigned low, unsigned high) {
    constexpr int index = k * PIXEL_BYTES + c;
    return (int)((index < 4 ? low >> 8 * index : high >> 8 * (index - 4)) & 255);
}

template <int c>
__device__ __forceinline__ void blend_channel(unsigned above_low, unsigned above_high, unsigned below_low,
                                              unsigned below_high, const Weight *weights_x, const Weight *weights_y,
                                              float &value) {
    const int taps[4] = {pair_byte<0, c>(above_low, above_high), pair_byte<1, c>(above_low, above_high),
                         pair_byte<0, c>(below_low, below_high), pair_byte<1, c>(below_low, below_high)};
    value = nbv_blend(taps, weights_x, weights_y);
}

#if NV12
// Blended red, green and blue of two pixels above and two below: each one's luma, and its chroma as u + 256 * v.
__device__ __forceinline__ void blend_nv12(const int *luma, const int *chroma, const Weight *weights_x,
                                           const Weight *weights_y, const Weight *matrix, float *rgb) {
#if WEIGHT == 0
    int colors[3][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int yuv[3] = {luma[k], chroma[k] & 255, chroma[k] >> 8};
        int color[3];
        nbv_convert(yuv, matrix, color);
#pragma unroll
        for (int c = 0; c < 3; ++c) colors[c][k] = color[c];
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) rgb[c] = nbv_blend(colors[c], weights_x, weights_y);
#else
    int u[4], v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        u[k] = chroma[k] & 255;
        v[k] = chroma[k] >> 8;
    }
    const float yuv[3] = {nbv_blend(luma, weights_x, weights_y), nbv_blend(u, weights_x, weights_y),
                          nbv_blend(v, weights_x, weights_y)};
    nbv_convert(yuv, matrix, rgb);
#endif
}
#endif

// `gain`, `bias` and `fill` are in the order of the source's channels; `swap` says that the output's is the reverse.
// The matrix is NV12's, whose first channel is red. With a chain, `bgr` says that the source's first channel is blue, and the chain's numbers follow.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    preprocess(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
               const long long *__restrict__ steps, const float *__restrict__ scales, Stored *__restrict__ out,
               int height, int width, int swap, float gain_0, float gain_1, float gain_2,
               float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 MATRIX_PARAMETERS
                   CHAIN_PARAMETERS) {
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
                                  (long long)(row.fields[REGION_X] * PIXEL_BYTES);
#if NV12
    const Weight matrix[6] = {luma_zero, luma_gain, v_to_r, u_to_g, v_to_g, u_to_b};
    const long long source_height = sources[4 * row.fields[REGION_IMAGE] + 2], chroma_pitch = source.pitch / 2;
    const unsigned short *chroma = reinterpret_cast<const unsigned short *>(pixels + source.address + source_height * source.pitch);
    const int region_x = row.fields[REGION_X], region_y = row.fields[REGION_Y];
#endif
#if SOURCE == 1
    const long long plane_bytes = sources[4 * row.fields[REGION_IMAGE] + 2] * source.pitch;
#endif
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
    Stored *canvas = out + (long long)blockIdx.z * OUT_CHANNELS * plane;
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
#if NV12
            // Frames start at even addresses and have even pitches, so the two bytes of a chroma are loaded at once.
            const unsigned short *chroma_above = chroma + ((region_y + lines[0]) >> 1) * chroma_pitch;
            const unsigned short *chroma_below = chroma + ((region_y + lines[1]) >> 1) * chroma_pitch;
#if PAIRS
            int luma[PIXELS][4], pairs[PIXELS][4];
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                // Past the region's last column lies another, or the chroma plane: a byte to read, of weight 0.
                const int at = columns[i][0], first = (region_x + at) >> 1, second = (region_x + columns[i][1]) >> 1;
                luma[i][0] = __ldg(above + at);
                luma[i][1] = __ldg(above + at + 1);
                luma[i][2] = __ldg(below + at);
                luma[i][3] = __ldg(below + at + 1);
                pairs[i][0] = __ldg(chroma_above + first);
                pairs[i][1] = __ldg(chroma_above + second);
                pairs[i][2] = __ldg(chroma_below + first);
                pairs[i][3] = __ldg(chroma_below + second);
            }
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                float rgb[3];
                blend_nv12(luma[i], pairs[i], weights_x[i], weights_y, matrix, rgb);
#pragma unroll
                for (int c = 0; c < 3; ++c) values[c][i] = rgb[c];
            }
#else
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                const int pair = __ldg(chroma_above + ((region_x + columns[i][0]) >> 1));
                const int yuv[3] = {__ldg(above + columns[i][0]), pair & 255, pair >> 8};
                int rgb[3];
                nbv_convert(yuv, matrix, rgb);
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    const int taps[4] = {rgb[c], rgb[c], rgb[c], rgb[c]};
                    values[c][i] = nbv_blend(taps, weights_x[i], weights_y);
                }
            }
#endif
#elif SOURCE == 2 || SOURCE == 3
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    constexpr int bytes = SOURCE == 2 ? 2 : 4;
                    const int first = PIXEL_BYTES * columns[i][0] + c * bytes;
                    const int second = PAIRS ? PIXEL_BYTES * columns[i][1] + c * bytes : first;
                    const float taps[4] = {element(above + first), element(above + second), element(below + first),
                                           element(below + second)};
                    values[c][i] = nbv_blend(taps, weights_x[i], weights_y);
                }
#else
#if SOURCE == 1
            // Not unrolled: the loads of three planes in flight together would need too many registers.
#pragma unroll 1
            for (int p = 0; p < PLANES; ++p, above += plane_bytes, below += plane_bytes) {
                float sampled[CHANNELS][PIXELS];
#else
            {
                float(&sampled)[3][PIXELS] = values;
#endif
#if PAIRS
            if (region_width == 1) {  // there is no pair
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    const int taps[4] = {above[c], above[c], below[c], below[c]};
#pragma unroll
                    for (int i = 0; i < PIXELS; ++i) sampled[c][i] = nbv_blend(taps, weights_x[i], weights_y);
                }
            } else {
                unsigned above_low[PIXELS], above_high[PIXELS], below_low[PIXELS], below_high[PIXELS];
#pragma unroll
                for (int i = 0; i < PIXELS; ++i) {
                    const int at = PIXEL_BYTES * min(columns[i][0], region_width - 2);
                    load_pair(above + at, above_low[i], above_high[i]);
                    load_pair(below + at, below_low[i], below_high[i]);
                }
#pragma unroll
                for (int i = 0; i < PIXELS; ++i) {
                    // The last column has no right neighbour: it was loaded as a pair's second, whose weight is 0.
                    if (columns[i][0] > region_width - 2) {
                        above_low[i] = __funnelshift_rc(above_low[i], above_high[i], 8 * PIXEL_BYTES);
                        below_low[i] = __funnelshift_rc(below_low[i], below_high[i], 8 * PIXEL_BYTES);
                    }
                    blend_channel<0>(above_low[i], above_high[i], below_low[i], below_high[i], weights_x[i], weights_y,
                                     sampled[0][i]);
#if CHANNELS == 3
                    blend_channel<1>(above_low[i], above_high[i], below_low[i], below_high[i], weights_x[i], weights_y,
                                     sampled[1][i]);
                    blend_channel<2>(above_low[i], above_high[i], below_low[i], below_high[i], weights_x[i], weights_y,
                                     sampled[2][i]);
#endif
                }
            }
#else
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    const int pixel = above[PIXEL_BYTES * columns[i][0] + c];
                    const int taps[4] = {pixel, pixel, pixel, pixel};
                    sampled[c][i] = nbv_blend(taps, weights_x[i], weights_y);
                }
#endif
#if SOURCE == 1
#pragma unroll
                for (int i = 0; i < PIXELS; ++i) {
                    if (p == 0) values[0][i] = sampled[0][i];
                    if (p == 1) values[1][i] = sampled[0][i];
                    if (p == 2) values[2][i] = sampled[0][i];
                }
#endif
            }
#endif
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                const int column = x_first + i - left;
                const bool inside = column >= 0 && column < out_width;
                const float first = values[0][i], second = values[COLORS == 3 ? 1 : 0][i];
                const float third = values[COLORS == 3 ? 2 : 0][i];
                values[0][i] = inside ? first : fill_0;
                values[1][i] = inside ? second : fill_1;
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
#ifdef CHAIN
        const float numbers[] = {CHAIN_NUMBERS};
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) {
            float rgb[3] = {bgr ? values[2][i] : values[0][i], values[1][i], bgr ? values[0][i] : values[2][i]};
            nbv_shade(rgb, (float)(x_first + i), (float)y, numbers);
            values[0][i] = bgr ? rgb[2] : rgb[0];
            values[1][i] = rgb[1];
            values[2][i] = bgr ? rgb[0] : rgb[2];
        }
#endif
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) {
            values[0][i] = values[0][i] * gain_0 + bias_0;
            values[1][i] = values[1][i] * gain_1 + bias_1;
            values[2][i] = values[2][i] * gain_2 + bias_2;
        }

        const long long pixel = (long long)y * width + x_first;
#if LAYOUT == 0 || LAYOUT == 3
        Stored *const planes[3] = {canvas + (swap ? 2 * plane : 0), canvas + plane, canvas + (swap ? 0 : 2 * plane)};
        if (wide) {
#pragma unroll
            for (int c = 0; c < OUT_CHANNELS; ++c) store(planes[c] + pixel, values[c]);
        } else {
#pragma unroll
            for (int c = 0; c < OUT_CHANNELS; ++c)
#pragma unroll
                for (int i = 0; i < PIXELS; ++i)
                    if (x_first + i < width) planes[c][pixel + i] = to_stored(values[c][i]);
        }
#else
        float line_values[OUT_CHANNELS * PIXELS];
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) {
            line_values[OUT_CHANNELS * i] = swap ? values[2][i] : values[0][i];
            line_values[OUT_CHANNELS * i + 1] = values[1][i];
            line_values[OUT_CHANNELS * i + 2] = swap ? values[0][i] : values[2][i];
#if OUT_CHANNELS == 4
            line_values[OUT_CHANNELS * i + 3] = 0.0f;
#endif
        }
        if (wide) {
#pragma unroll
            for (int k = 0; k < OUT_CHANNELS; ++k)
                store(canvas + OUT_CHANNELS * pixel + PIXELS * k, line_values + PIXELS * k);
        } else {
#pragma unroll
            for (int i = 0; i < OUT_CHANNELS * PIXELS; ++i)
                if (x_first + i / OUT_CHANNELS < width) canvas[OUT_CHANNELS * pixel + i] = to_stored(line_values[i]);
        }
#endif
    }
}
