// The resample family's frame: a block makes 32 columns by 16 lines of one canvas. It brings the lines of the source that
// it needs into shared memory by whole words, sums along them, and then across them; or, where Pillow does, first across.
// Weights come from the tap tables of resample.py; the rounding and the chain are Python functions, linked in.
//
// Compiled with -D: PIXEL_BYTES of the source (1 gray, 3, 4), STORE_TYPE (0 u8, 1 f16, 2 f32, 4 i8), LAYOUT (0 NCHW,
// 1 NHWC), the fields of regions.py, and for a chain of pixel functions CHAIN, CHAIN_PARAMETERS and CHAIN_NUMBERS.

extern "C" __device__ int nbv_round_sum(int total);
extern "C" __device__ int nbv_vertical_first(int width, int height, int out_width, int out_height);
#ifdef CHAIN
extern "C" __device__ void nbv_shade(float *rgb, float x, float y, const float *numbers);
#else
#define CHAIN_PARAMETERS
#endif

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
#elif STORE_TYPE == 4
typedef signed char Stored;
__device__ __forceinline__ Stored to_stored(float value) {
    return (signed char)fminf(fmaxf(rintf(value), -128.0f), 127.0f);
}
#else
typedef float Stored;
__device__ __forceinline__ Stored to_stored(float value) { return value; }
#endif

#define CHANNELS (PIXEL_BYTES == 1 ? 1 : 3)  // alpha is dropped
constexpr int COLUMNS = 32, LINES = 16, WARPS = 8, THREADS = 32 * WARPS;
constexpr int OWN = LINES / WARPS;       // output lines of a thread
constexpr int RAW_BYTES = 30 * 1024;     // of source lines at a time
constexpr int AHEAD = 4;                 // of those lines a warp sums at once
constexpr int MAX_LINES = AHEAD * WARPS;
constexpr int BETWEEN = MAX_LINES * COLUMNS;

struct alignas(16) Source {
    unsigned long long address;
    long long pitch;
};

// Channel c of pixel k of four pixels in words.
template <int k, int c>
__device__ __forceinline__ int byte_of(const unsigned *words) {
    constexpr int index = k * PIXEL_BYTES + c;
    return (int)(words[index / 4] >> 8 * (index % 4) & 255);
}

template <int k>
__device__ __forceinline__ void add_pixel(const unsigned *words, int weight, int *sums) {
    sums[0] += byte_of<k, 0>(words) * weight;
#if CHANNELS == 3
    sums[1] += byte_of<k, 1>(words) * weight;
    sums[2] += byte_of<k, 2>(words) * weight;
#endif
}

// Sums along N lines in shared memory; line n's pixel 0 is `starts[n]` bytes into `words`. A weight serves all lines;
// tables are padded to groups of four.
template <int N>
__device__ __forceinline__ void sum_lines(const unsigned *words, const int *starts, int first, int count,
                                          const int *weights, int to_next, int (*sums)[CHANNELS]) {
    const unsigned *at[N];
    int bits[N];
    unsigned carried[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int start = starts[n] + first * PIXEL_BYTES;
        at[n] = words + start / 4;
        bits[n] = 8 * (start & 3);
        carried[n] = at[n][0];
    }
    for (int tap = 0; tap < count; tap += 4) {
        const int weight_0 = weights[0], weight_1 = weights[to_next];
        const int weight_2 = weights[2 * to_next], weight_3 = weights[3 * to_next];
        weights += 4 * to_next;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            unsigned group[PIXEL_BYTES];
#pragma unroll
            for (int i = 0; i < PIXEL_BYTES; ++i) {
                const unsigned next = at[n][i + 1];
                group[i] = __funnelshift_r(carried[n], next, bits[n]);
                carried[n] = next;
            }
            at[n] += PIXEL_BYTES;
            add_pixel<0>(group, weight_0, sums[n]);
            add_pixel<1>(group, weight_1, sums[n]);
            add_pixel<2>(group, weight_2, sums[n]);
            add_pixel<3>(group, weight_3, sums[n]);
        }
    }
}

// The same straight from the source, for windows that shared memory does not hold.
__device__ __forceinline__ void sum_far_line(const unsigned char *line, int first, int count, const int *weights,
                                             int to_next, int *sums) {
    for (int tap = 0; tap < count; ++tap)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            sums[c] += line[(first + tap) * PIXEL_BYTES + c] * weights[tap * to_next];
}

// The newest compilers' targets take more registers for the same code.
#if __CUDA_ARCH__ >= 1000
constexpr int BLOCKS = 3;
#else
constexpr int BLOCKS = 4;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    resample(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
             const int *__restrict__ x_table, const int *__restrict__ y_table, int x_limit, int y_limit,
             Stored *__restrict__ out, int height, int width, int swap, float gain_0, float gain_1, float gain_2,
             float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 CHAIN_PARAMETERS) {
    __shared__ unsigned raw[RAW_BYTES / 4 + 8];
    __shared__ unsigned between[CHANNELS == 3 ? BETWEEN : BETWEEN / 4];  // a pixel a word, or gray in bytes
    __shared__ int extents[4];

    const int *row = regions + (long long)blockIdx.z * REGION_FIELDS;
    const Source source = reinterpret_cast<const Source *>(sources)[2 * row[REGION_IMAGE]];
    const unsigned char *origin = pixels + source.address + row[REGION_Y] * source.pitch +
                                  (long long)(row[REGION_X] * PIXEL_BYTES);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int x = blockIdx.x * COLUMNS + lane, y_first = blockIdx.y * LINES;

    const int *x_taps = x_table + (long long)blockIdx.z * (x_limit + 2) * width;
    const int *y_taps = y_table + (long long)blockIdx.z * (y_limit + 2) * height;
    const int x_start = x < width ? x_taps[x] : 0, x_count = x < width ? x_taps[width + x] : 0;
    const int *x_weights = x_taps + 2 * width + min(x, width - 1);

    // Columns and lines of the source that the block needs.
    if (thread < 4) extents[thread] = thread & 1 ? 0 : 0x7fffffff;
    __syncthreads();
    if (warp == 0 && x_count > 0) {
        atomicMin(&extents[0], x_start);
        atomicMax(&extents[1], x_start + x_count);
    }
    if (warp == 1 && lane < LINES && y_first + lane < height && y_taps[height + y_first + lane] > 0) {
        atomicMin(&extents[2], y_taps[y_first + lane]);
        atomicMax(&extents[3], y_taps[y_first + lane] + y_taps[height + y_first + lane]);
    }
    __syncthreads();
    const int left = extents[0], right = extents[1], top = extents[2], bottom = extents[3];
    const bool anything = right > 0 && bottom > 0;
    // Words of a line in shared memory: four pixels more for the padding of windows, and a word for the shift.
    const int line_bytes = anything ? (right - left) * PIXEL_BYTES : 0;
    const int line_words = (line_bytes + 4 * PIXEL_BYTES + 3) / 4 + 2;
    const bool fits = line_words <= RAW_BYTES / 4;
    const int lines_at_once = min(MAX_LINES, fits ? RAW_BYTES / 4 / line_words : MAX_LINES);

    int sums[OWN][CHANNELS];
    int y_start[OWN], y_count[OWN];
#pragma unroll
    for (int o = 0; o < OWN; ++o) {
        const int y = y_first + warp + o * WARPS;
        y_start[o] = y < height ? y_taps[y] : 0;
        y_count[o] = y < height ? y_taps[height + y] : 0;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sums[o][c] = 0;
    }

    if (anything && nbv_vertical_first(row[REGION_WIDTH], row[REGION_HEIGHT], row[REGION_OUT_WIDTH],
                                       row[REGION_OUT_HEIGHT])) {
        // Across first: each output line's own sums of the source columns, in shared memory; then along it.
        const unsigned char *corner = origin + (long long)left * PIXEL_BYTES;
        for (int first = 0; first < LINES; first += lines_at_once) {
            const int lines = min(lines_at_once, LINES - first);
            if (fits) {
                for (int at = thread; at < lines * line_bytes; at += THREADS) {
                    const int line = at / line_bytes, byte = at - line * line_bytes, y = y_first + first + line;
                    int total = 0;
                    if (y < height) {
                        const unsigned char *from = corner + (long long)y_taps[y] * source.pitch + byte;
                        const int *weights = y_taps + 2 * height + y;
                        for (int tap = y_taps[height + y]; tap > 0; --tap, from += source.pitch, weights += height)
                            total += *from * *weights;
                    }
                    reinterpret_cast<unsigned char *>(raw)[line * line_words * 4 + byte] =
                        (unsigned char)nbv_round_sum(total);
                }
                __syncthreads();
            }
#pragma unroll
            for (int o = 0; o < OWN; ++o) {
                const int line = warp + o * WARPS - first;
                if (line < 0 || line >= lines || x_count == 0 || y_count[o] == 0) continue;
                if (fits) {
                    const int start = 4 * line * line_words;
                    sum_lines<1>(raw, &start, x_start - left, x_count, x_weights, width, &sums[o]);
                    continue;
                }
                for (int tap = 0; tap < x_count; ++tap) {
                    const unsigned char *column = origin + (long long)y_start[o] * source.pitch +
                                                  (long long)(x_start + tap) * PIXEL_BYTES;
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) {
                        int total = 0;
                        for (int line_tap = 0; line_tap < y_count[o]; ++line_tap)
                            total += column[line_tap * source.pitch + c] *
                                     y_taps[(line_tap + 2) * height + y_first + warp + o * WARPS];
                        sums[o][c] += nbv_round_sum(total) * x_weights[tap * width];
                    }
                }
            }
            __syncthreads();
        }
    } else if (anything) {
        for (int first = top; first < bottom; first += lines_at_once) {
            const int lines = min(lines_at_once, bottom - first);
            if (fits) {
                // Whole words, but none without a byte of the window, so nothing outside the allocation is touched.
                for (int line = warp; line < lines; line += WARPS) {
                    const unsigned long long address = reinterpret_cast<unsigned long long>(
                        origin + (first + line) * source.pitch + (long long)left * PIXEL_BYTES);
                    const unsigned *from = reinterpret_cast<const unsigned *>(address & ~3ull);
                    const int words = ((int)(address & 3) + line_bytes + 3) / 4;
                    for (int word = lane; word < words; word += 32) raw[line * line_words + word] = __ldg(from + word);
                }
                __syncthreads();
            }
            if (x_count > 0) {
                int along[AHEAD][CHANNELS], starts[AHEAD];
#pragma unroll
                for (int n = 0; n < AHEAD; ++n) {
                    const int line = min(warp + n * WARPS, lines - 1);  // some warps have one line twice
                    const unsigned char *start = origin + (first + line) * source.pitch + (long long)left * PIXEL_BYTES;
                    starts[n] = 4 * line * line_words + (int)(reinterpret_cast<unsigned long long>(start) & 3);
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) along[n][c] = 0;
                    if (!fits) sum_far_line(start, x_start - left, x_count, x_weights, width, along[n]);
                }
                if (fits) sum_lines<AHEAD>(raw, starts, x_start - left, x_count, x_weights, width, along);
#pragma unroll
                for (int n = 0; n < AHEAD; ++n) {
                    const int line = warp + n * WARPS;
                    if (line >= lines) break;
#if CHANNELS == 3
                    between[line * COLUMNS + lane] = nbv_round_sum(along[n][0]) | nbv_round_sum(along[n][1]) << 8 |
                                                     nbv_round_sum(along[n][2]) << 16;
#else
                    reinterpret_cast<unsigned char *>(between)[line * COLUMNS + lane] =
                        (unsigned char)nbv_round_sum(along[n][0]);
#endif
                }
            }
            __syncthreads();
            if (x_count > 0)
#pragma unroll
                for (int o = 0; o < OWN; ++o) {
                    const int from = max(y_start[o], first), stop = min(y_start[o] + y_count[o], first + lines);
                    const int *weights = y_taps + 2 * height + y_first + warp + o * WARPS;
                    for (int line = from; line < stop; ++line) {
                        const int weight = weights[(line - y_start[o]) * height];
#if CHANNELS == 3
                        const unsigned pixel = between[(line - first) * COLUMNS + lane];
                        sums[o][0] += (int)(pixel & 255) * weight;
                        sums[o][1] += (int)(pixel >> 8 & 255) * weight;
                        sums[o][2] += (int)(pixel >> 16) * weight;
#else
                        sums[o][0] += reinterpret_cast<unsigned char *>(between)[(line - first) * COLUMNS + lane] * weight;
#endif
                    }
                }
            __syncthreads();
        }
    }
    if (x >= width) return;

    const long long plane = (long long)height * width;
    Stored *canvas = out + (long long)blockIdx.z * 3 * plane;
#pragma unroll
    for (int o = 0; o < OWN; ++o) {
        const int y = y_first + warp + o * WARPS;
        if (y >= height) return;
        float values[3] = {fill_0, fill_1, fill_2};
        if (x_count > 0 && y_count[o] > 0) {
            values[0] = (float)nbv_round_sum(sums[o][0]);
            values[1] = CHANNELS == 3 ? (float)nbv_round_sum(sums[o][CHANNELS - 2]) : values[0];
            values[2] = CHANNELS == 3 ? (float)nbv_round_sum(sums[o][CHANNELS - 1]) : values[0];
        }
#ifdef CHAIN
        const float numbers[] = {CHAIN_NUMBERS};
        float rgb[3] = {bgr ? values[2] : values[0], values[1], bgr ? values[0] : values[2]};
        nbv_shade(rgb, (float)x, (float)y, numbers);
        values[0] = bgr ? rgb[2] : rgb[0];
        values[1] = rgb[1];
        values[2] = bgr ? rgb[0] : rgb[2];
#endif
        const Stored first = to_stored(values[0] * gain_0 + bias_0), second = to_stored(values[1] * gain_1 + bias_1);
        const Stored third = to_stored(values[2] * gain_2 + bias_2);
        const long long pixel = (long long)y * width + x;
#if LAYOUT == 0
        canvas[(swap ? 2 * plane : 0) + pixel] = first;
        canvas[plane + pixel] = second;
        canvas[(swap ? 0 : 2 * plane) + pixel] = third;
#else
        canvas[3 * pixel] = swap ? third : first;
        canvas[3 * pixel + 1] = second;
        canvas[3 * pixel + 2] = swap ? first : third;
#endif
    }
}
