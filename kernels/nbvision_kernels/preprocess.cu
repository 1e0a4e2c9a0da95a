// The fused plan's frame: loads by words, wide stores, four pixels in each of several lines a thread. It only
// moves data; taps and values are the Python pixel functions of sampling.py, linked in through LTO.
//
// Compiled with -D: SOURCE (0 bytes side by side, 1 planes of bytes, 2 halves, 3 floats, 4 NV12), PIXEL_BYTES of the
// source (of planes and NV12 1), GRAY (whether that is one channel), PAIRS (whether the sampler reads two neighbouring
// columns), WEIGHT (0 int, 1 float), LINES and REGISTERS of a thread, LINE_THREADS for a line of a block, the fields of
// regions.py, and those of frame.cuh.
// No header of CUDA is included, so NVRTC needs no include directory.
#include "frame.cuh"

#if WEIGHT == 0
typedef int Weight;
#else
typedef float Weight;
#endif

#define NV12 (SOURCE == 4)
#define DOT (PAIRS && WEIGHT == 0 && SOURCE < 2)
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
#if DOT
extern "C" __device__ float nbv_down(int above, int below, Weight top_weight, Weight bottom_weight);
#endif
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
constexpr int ROWS = 4, THREADS = LINE_THREADS * ROWS;  // of a block, which makes as many columns
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int MAX_REGISTERS = REGISTERS;
#else  // a multiprocessor that holds 1,536 threads has registers for a third more each
constexpr int MAX_REGISTERS = REGISTERS + 16;
#endif
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204
#define BOUNDS __maxnreg__(MAX_REGISTERS)
#else
#define BOUNDS __launch_bounds__(THREADS, 65536 / (THREADS * MAX_REGISTERS))
#endif
// A thread has two pixels side by side, and two more half a block's width further: what a warp loads at once is then half
// as long, and takes half as many accesses. docs/preprocess.md has the alternatives.
constexpr int PIXELS = 4, SIDE_BY_SIDE = 2, HALF = SIDE_BY_SIDE * LINE_THREADS;

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
struct alignas(SIDE_BY_SIDE * sizeof(Stored)) Packed {
    Stored values[SIDE_BY_SIDE];
};

__device__ __forceinline__ void store(Stored *to, const float *values) {
#if (STORE_TYPE == 1 || STORE_TYPE == 5) && __CUDA_ARCH__ >= 800
    *reinterpret_cast<unsigned *>(to) = to_stored(values[0], values[1]);
#else
    *reinterpret_cast<Packed *>(to) = {to_stored(values[0]), to_stored(values[1])};
#endif
}

#if PAIRS && SOURCE < 2
// Two neighbouring pixels of a line, by aligned words: two or three loads where bytes would be six. No word without a
// byte of the pair is touched, so nothing outside the allocation is.
struct Pair {
    unsigned low, high;
};
__device__ __forceinline__ Pair load_pair(const unsigned char *at) {
    const unsigned long long address = reinterpret_cast<unsigned long long>(at);
    const unsigned *word = reinterpret_cast<const unsigned *>(address & ~3ull);
    unsigned low;  // opaque to the compiler, which would test the last bits of all 64
    asm("cvt.u32.u64 %0, %1;" : "=r"(low) : "l"(address));
    const int shift = 8 * low;  // the funnel's is modulo 32
    const unsigned word_0 = __ldg(word);
    // Of two bytes or six a word more is touched if the first is a word's last, of eight unless it is a word's first. As
    // an instruction with a predicate it need not be anything else first.
    unsigned last;
#if PIXEL_BYTES == 4
#define TOUCHED "setp.ne.u32 touched, place, 0;"
#else
#define TOUCHED "setp.eq.u32 touched, place, 3;"
#endif
    asm("{.reg .pred touched; .reg .b32 place; and.b32 place, %2, 3; " TOUCHED " @touched ld.global.nc.u32 %0, [%1];}"
        : "=r"(last)
        : "l"(word + (PIXEL_BYTES == 1 ? 1 : 2)), "r"(low));
#if PIXEL_BYTES == 1
    return {__funnelshift_r(word_0, last, shift), 0u};
#else
    const unsigned word_1 = __ldg(word + 1);
    return {__funnelshift_r(word_0, word_1, shift), __funnelshift_r(word_1, last, shift)};
#endif
}

// The pair that a region of one column does not have.
__device__ __forceinline__ Pair pair_of_one(const unsigned char *at) {
    unsigned long long bytes = 0;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) bytes |= __ldg(at + c) * (1ull << 8 * c | 1ull << 8 * (PIXEL_BYTES + c));
    return {(unsigned)bytes, (unsigned)(bytes >> 32)};
}

#if DOT
// Along a line the weighted sums of OpenCV's integers are dot products of two bytes with two halves of a word.
typedef unsigned PairWeights;
__device__ __forceinline__ PairWeights pair_weights(const Weight *weights) { return weights[0] | weights[1] << 16; }

__device__ __forceinline__ void blend_pairs(Pair above, Pair below, PairWeights weights_x, const Weight *weights_y,
                                            float *values) {
    constexpr unsigned FIRST_TWO = 0x1100 + 0x1010 * PIXEL_BYTES, THIRD = 0x22 + 0x10 * PIXEL_BYTES;
    const Pair lines[2] = {above, below};
    int sums[3][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const unsigned bytes = __byte_perm(lines[k].low, lines[k].high, FIRST_TWO);
        asm("dp2a.lo.u32.u32 %0, %1, %2, 0;" : "=r"(sums[0][k]) : "r"(weights_x), "r"(bytes));
#if CHANNELS == 3
        const unsigned third = __byte_perm(lines[k].low, lines[k].high, THIRD);
        asm("dp2a.hi.u32.u32 %0, %1, %2, 0;" : "=r"(sums[1][k]) : "r"(weights_x), "r"(bytes));
        asm("dp2a.lo.u32.u32 %0, %1, %2, 0;" : "=r"(sums[2][k]) : "r"(weights_x), "r"(third));
#endif
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) values[c] = nbv_down(sums[c][0], sums[c][1], weights_y[0], weights_y[1]);
}
#else
struct alignas(8) PairWeights {
    Weight weights[2];
};
__device__ __forceinline__ PairWeights pair_weights(const Weight *weights) { return {{weights[0], weights[1]}}; }

// Channel c of the pair's first (k = 0) or second pixel.
template <int k, int c>
__device__ __forceinline__ int pair_byte(Pair pair) {
    constexpr int index = k * PIXEL_BYTES + c;
    return (int)((index < 4 ? pair.low >> 8 * index : pair.high >> 8 * (index - 4)) & 255);
}

template <int c>
__device__ __forceinline__ float blend_channel(Pair above, Pair below, const Weight *weights_x, const Weight *weights_y) {
    const int taps[4] = {pair_byte<0, c>(above), pair_byte<1, c>(above), pair_byte<0, c>(below), pair_byte<1, c>(below)};
    return nbv_blend(taps, weights_x, weights_y);
}

__device__ __forceinline__ void blend_pairs(Pair above, Pair below, PairWeights weights_x, const Weight *weights_y,
                                            float *values) {
    values[0] = blend_channel<0>(above, below, weights_x.weights, weights_y);
#if CHANNELS == 3
    values[1] = blend_channel<1>(above, below, weights_x.weights, weights_y);
    values[2] = blend_channel<2>(above, below, weights_x.weights, weights_y);
#endif
}
#endif

// An output column's pair: where its first pixel is on its line, and the weights of both.
struct alignas(8) Column {
    unsigned at;
    PairWeights weights;
};
__device__ __forceinline__ Column column_of(const int *taps, const Weight *weights, int region_width) {
    // The last column has no right neighbour, and all the weight: it is loaded as the second of a pair.
    const bool is_last = taps[0] > region_width - 2;
    const Weight ordered[2] = {is_last ? weights[1] : weights[0], is_last ? weights[0] : weights[1]};
    return {(unsigned)(PIXEL_BYTES * (taps[0] - is_last)), pair_weights(ordered)};
}
#else
struct alignas(16) Column {
    int first, second;
    Weight weights[2];
};
__device__ __forceinline__ Column column_of(const int *taps, const Weight *weights, int region_width) {
    return {taps[0], taps[1], {weights[0], weights[1]}};
}
#endif

struct alignas(16) Line {  // an output line's, in the source
    const unsigned char *above, *below;
#if NV12
    const unsigned short *chroma_above, *chroma_below;
#endif
    Weight weights[2];
};

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
extern "C" __global__ void BOUNDS
    preprocess(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
               const long long *__restrict__ steps, const float *__restrict__ scales, Stored *__restrict__ out,
               int height, int width, int swap, float gain_0, float gain_1, float gain_2,
               float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 MATRIX_PARAMETERS
                   CHAIN_PARAMETERS) {
    const Row row = reinterpret_cast<const Row *>(regions)[blockIdx.z];
    const Source source = reinterpret_cast<const Source *>(sources)[2 * row.fields[REGION_IMAGE]];
    const int left = row.fields[REGION_LEFT], out_width = row.fields[REGION_OUT_WIDTH];
    const int region_width = row.fields[REGION_WIDTH];

    // Taps are clamped to the region, so those of columns and lines outside it are harmless.
    __shared__ Column columns_of_block[THREADS];
    __shared__ Line lines_of_block[ROWS * LINES];
    const int thread = LINE_THREADS * threadIdx.y + threadIdx.x;
    {
        const Steps step = reinterpret_cast<const Steps *>(steps)[blockIdx.z];
        const float *scale = scales + (long long)blockIdx.z * REGION_SCALES;
        int taps[2];
        Weight weights[2];
        nbv_along_x(THREADS * blockIdx.x + thread - left, step.step_x, step.start_x, scale[REGION_UNIT_X], region_width,
                    taps, weights);
        columns_of_block[thread] = column_of(taps, weights, region_width);
        if (thread < ROWS * LINES) {
            nbv_along_y(ROWS * LINES * blockIdx.y + thread - row.fields[REGION_TOP], step.step_y, step.start_y,
                        scale[REGION_UNIT_Y], row.fields[REGION_HEIGHT], taps, weights);
            const unsigned char *origin = pixels + source.address + row.fields[REGION_Y] * source.pitch +
                                          (long long)(row.fields[REGION_X] * PIXEL_BYTES);
            Line &line = lines_of_block[thread];
            line.above = origin + taps[0] * source.pitch;
            line.below = origin + taps[1] * source.pitch;
            line.weights[0] = weights[0];
            line.weights[1] = weights[1];
#if NV12
            const long long lines = sources[4 * row.fields[REGION_IMAGE] + 2];
            const unsigned char *chroma = pixels + source.address + lines * source.pitch;
            // Half as many lines as of luma, of as many bytes: two for two pixels.
            const int region_y = row.fields[REGION_Y];
            line.chroma_above = reinterpret_cast<const unsigned short *>(chroma + ((region_y + taps[0]) >> 1) * source.pitch);
            line.chroma_below = reinterpret_cast<const unsigned short *>(chroma + ((region_y + taps[1]) >> 1) * source.pitch);
#endif
        }
    }
    __syncthreads();

    const int x_of_block = SIDE_BY_SIDE * threadIdx.x, x_first = THREADS * blockIdx.x + x_of_block;
    if (x_first >= width) return;
    constexpr int offsets[PIXELS] = {0, 1, HALF, HALF + 1};
    const bool some_inside = x_first < left + out_width && x_first + HALF + 1 >= left;
    const bool all_inside = x_first >= left && x_first + HALF + 1 < left + out_width;
    Column columns[PIXELS];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) columns[i] = columns_of_block[x_of_block + offsets[i]];
#if NV12
    const Weight matrix[6] = {luma_zero, luma_gain, v_to_r, u_to_g, v_to_g, u_to_b};
    const int region_x = row.fields[REGION_X];
#endif
#if SOURCE == 1
    const long long plane_bytes = sources[4 * row.fields[REGION_IMAGE] + 2] * source.pitch;
#endif

    const long long plane = (long long)height * width;
    Stored *canvas = out + (long long)blockIdx.z * OUT_CHANNELS * plane;
    // Every line starts on a wide boundary when the width is even and `out` itself is aligned.
    const bool wide = width % SIDE_BY_SIDE == 0 && (unsigned long long)out % sizeof(Packed) == 0;
#pragma unroll
    for (int l = 0; l < LINES; ++l) {
        const int line_of_block = ROWS * l + threadIdx.y, y = ROWS * LINES * blockIdx.y + line_of_block;
        if (y >= height) return;
        const int line = y - row.fields[REGION_TOP];
        float values[3][PIXELS];
        if (some_inside && line >= 0 && line < row.fields[REGION_OUT_HEIGHT]) {
            const Line from = lines_of_block[line_of_block];
            const unsigned char *above = from.above, *below = from.below;
            const Weight *weights_y = from.weights;
#if NV12
            const unsigned short *chroma_above = from.chroma_above, *chroma_below = from.chroma_below;
#if PAIRS
            int luma[PIXELS][4], pairs[PIXELS][4];
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                // Past the region's last column lies another, or the chroma plane: a byte to read, of weight 0.
                const int at = columns[i].first, first = (region_x + at) >> 1, second = (region_x + columns[i].second) >> 1;
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
                blend_nv12(luma[i], pairs[i], columns[i].weights, weights_y, matrix, rgb);
#pragma unroll
                for (int c = 0; c < 3; ++c) values[c][i] = rgb[c];
            }
#else
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) {
                const int pair = __ldg(chroma_above + ((region_x + columns[i].first) >> 1));
                const int yuv[3] = {__ldg(above + columns[i].first), pair & 255, pair >> 8};
                int rgb[3];
                nbv_convert(yuv, matrix, rgb);
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    const int taps[4] = {rgb[c], rgb[c], rgb[c], rgb[c]};
                    values[c][i] = nbv_blend(taps, columns[i].weights, weights_y);
                }
            }
#endif
#elif SOURCE == 2 || SOURCE == 3
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    constexpr int bytes = SOURCE == 2 ? 2 : 4;
                    const int first = PIXEL_BYTES * columns[i].first + c * bytes;
                    const int second = PAIRS ? PIXEL_BYTES * columns[i].second + c * bytes : first;
                    const float taps[4] = {element(above + first), element(above + second), element(below + first),
                                           element(below + second)};
                    values[c][i] = nbv_blend(taps, columns[i].weights, weights_y);
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
            {
                Pair pairs_above[PIXELS], pairs_below[PIXELS];
                // One branch around all loads: branches between them would keep them from being in flight together.
                if (region_width > 1) {
#pragma unroll
                    for (int i = 0; i < PIXELS; ++i) {
                        pairs_above[i] = load_pair(above + columns[i].at);
                        pairs_below[i] = load_pair(below + columns[i].at);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < PIXELS; ++i) {
                        pairs_above[i] = pair_of_one(above);
                        pairs_below[i] = pair_of_one(below);
                    }
                }
#pragma unroll
                for (int i = 0; i < PIXELS; ++i) {
                    float blended[CHANNELS];
                    blend_pairs(pairs_above[i], pairs_below[i], columns[i].weights, weights_y, blended);
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) sampled[c][i] = blended[c];
                }
            }
#else
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    const int pixel = __ldg(above + PIXEL_BYTES * columns[i].first + c);
                    const int taps[4] = {pixel, pixel, pixel, pixel};
                    sampled[c][i] = nbv_blend(taps, columns[i].weights, weights_y);
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
#if COLORS == 1
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) values[1][i] = values[2][i] = values[0][i];
#endif
            if (!all_inside) {
#pragma unroll
                for (int i = 0; i < PIXELS; ++i) {
                    const int column = x_first + offsets[i] - left;
                    const bool inside = column >= 0 && column < out_width;
                    values[0][i] = inside ? values[0][i] : fill_0;
                    values[1][i] = inside ? values[1][i] : fill_1;
                    values[2][i] = inside ? values[2][i] : fill_2;
                }
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
            nbv_shade(rgb, (float)(x_first + offsets[i]), (float)y, numbers);
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
            for (int i = 0; i < PIXELS; i += SIDE_BY_SIDE)
                if (x_first + offsets[i] < width)
#pragma unroll
                    for (int c = 0; c < OUT_CHANNELS; ++c) store(planes[c] + pixel + offsets[i], values[c] + i);
        } else {
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
                if (x_first + offsets[i] < width)
#pragma unroll
                    for (int c = 0; c < OUT_CHANNELS; ++c) planes[c][pixel + offsets[i]] = to_stored(values[c][i]);
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
            for (int i = 0; i < PIXELS; i += SIDE_BY_SIDE)
                if (x_first + offsets[i] < width)
#pragma unroll
                    for (int k = 0; k < OUT_CHANNELS; ++k)
                        store(canvas + OUT_CHANNELS * (pixel + offsets[i]) + SIDE_BY_SIDE * k,
                              line_values + OUT_CHANNELS * i + SIDE_BY_SIDE * k);
        } else {
#pragma unroll
            for (int i = 0; i < PIXELS; ++i)
                if (x_first + offsets[i] < width)
#pragma unroll
                    for (int c = 0; c < OUT_CHANNELS; ++c)
                        canvas[OUT_CHANNELS * (pixel + offsets[i]) + c] = to_stored(line_values[OUT_CHANNELS * i + c]);
        }
#endif
    }
}
