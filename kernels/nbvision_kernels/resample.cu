// The resample family's frame: a block makes 32 columns by 16 lines of one canvas. It brings the lines of the source that
// it needs into shared memory by whole words, sums along them, and then across them; or, where Pillow does, first across.
// Weights come from the tap tables of resample.py, along lines as bytes, so that one instruction multiplies four pixels;
// the rounding and the chain are Python functions, linked in.
//
// Compiled with -D: PIXEL_BYTES of the source (1 gray, 3, 4), the fields of regions.py, and those of frame.cuh.
#include "frame.cuh"

extern "C" __device__ int nbv_round_sum(int total);
extern "C" __device__ int nbv_vertical_first(int width, int height, int out_width, int out_height);
#define CHANNELS (PIXEL_BYTES == 1 ? 1 : 3)  // alpha is dropped
constexpr int COLUMNS = 32, LINES = 16, WARPS = 8, THREADS = 32 * WARPS;
constexpr int OWN = LINES / WARPS;       // output lines of a thread
constexpr int RAW_BYTES = 30 * 1024;     // of source lines at a time
constexpr int MAX_LINES = 32;            // of those, at most: one for each lane
constexpr int BETWEEN_PITCH = COLUMNS + 1;

// Bytes times weights, four at once. A weight is three bytes, of which the highest has the sign.
struct Sums {
    unsigned low = 0, middle = 0;
    int high = 0;
    __device__ __forceinline__ void add(unsigned four, const uint4 &weights) {
        low = __dp4a(four, weights.x, low);
        middle = __dp4a(four, weights.y, middle);
        asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(high) : "r"(four), "r"(weights.z));
    }
    __device__ __forceinline__ int total() const { return (int)(low + (middle << 8)) + (high << 16); }
};

// Four pixels in words, sorted by channel.
__device__ __forceinline__ void sort_channels(const unsigned *words, unsigned *channels) {
#if PIXEL_BYTES == 1
    channels[0] = words[0];
#elif PIXEL_BYTES == 3
    channels[0] = __byte_perm(__byte_perm(words[0], words[1], 0x0630), words[2], 0x5210);
    channels[1] = __byte_perm(__byte_perm(words[0], words[1], 0x0741), words[2], 0x6210);
    channels[2] = __byte_perm(__byte_perm(words[0], words[1], 0x0052), words[2], 0x7410);
#else
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const unsigned pick = c | (4 + c) << 4;
        channels[c] = __byte_perm(__byte_perm(words[0], words[1], pick), __byte_perm(words[2], words[3], pick), 0x5410);
    }
#endif
}

// Sums along a line in shared memory, from byte `start` of `words`; tables are padded to groups of four.
__device__ __forceinline__ void sum_line(const unsigned *words, int start, const int *entry, int *totals) {
    const unsigned *at = words + start / 4;
    const int bits = 8 * (start & 3), count = entry[1];
    const uint4 *weights = reinterpret_cast<const uint4 *>(entry + 4);
    Sums sums[CHANNELS];
    unsigned carried = at[0];
#pragma unroll 2
    for (int tap = 0; tap < count; tap += 4) {
        unsigned group[PIXEL_BYTES], channels[CHANNELS];
#pragma unroll
        for (int i = 0; i < PIXEL_BYTES; ++i) {
            const unsigned next = at[i + 1];
            group[i] = __funnelshift_r(carried, next, bits);
            carried = next;
        }
        at += PIXEL_BYTES;
        sort_channels(group, channels);
        const uint4 four = __ldg(weights++);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sums[c].add(channels[c], four);
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) totals[c] = sums[c].total();
}

// One weight of a packed entry.
__device__ __forceinline__ int weight_of(const int *entry, int tap) {
    const int *four = entry + 4 + (tap & ~3);
    const int shift = 8 * (tap & 3);
    return (int)((unsigned)four[0] >> shift & 255) | (int)((unsigned)four[1] >> shift & 255) << 8 |
           (int)(signed char)((unsigned)four[2] >> shift & 255) << 16;
}

// The same straight from the source, for windows that shared memory does not hold.
__device__ __forceinline__ void sum_far_line(const unsigned char *line, const int *entry, int *totals) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) totals[c] = 0;
#pragma unroll 1
    for (int tap = 0; tap < entry[1]; ++tap) {
        const int weight = weight_of(entry, tap);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) totals[c] += line[(entry[0] + tap) * PIXEL_BYTES + c] * weight;
    }
}

// And the same where the source is summed across first: as many products as the window has pixels.
__device__ __forceinline__ void sum_far_column(const unsigned char *origin, long long pitch, const int *x_entry,
                                               const int *y_entry, int *totals) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) totals[c] = 0;
#pragma unroll 1
    for (int tap = 0; tap < x_entry[1]; ++tap) {
        const unsigned char *column = origin + y_entry[0] * pitch + (long long)(x_entry[0] + tap) * PIXEL_BYTES;
        const int weight = weight_of(x_entry, tap);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            int total = 0;
#pragma unroll 1
            for (int line = 0; line < y_entry[1]; ++line) total += column[line * pitch + c] * y_entry[4 + line];
            totals[c] += nbv_round_sum(total) * weight;
        }
    }
}

__device__ __forceinline__ unsigned rounded(const int *totals) {
    unsigned pixel = nbv_round_sum(totals[0]);
#if CHANNELS == 3
    pixel |= nbv_round_sum(totals[1]) << 8 | nbv_round_sum(totals[2]) << 16;
#endif
    return pixel;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    resample(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
             const int *__restrict__ x_table, const int *__restrict__ y_table, int x_limit, int y_limit,
             Stored *__restrict__ out, int height, int width, int swap, float gain_0, float gain_1, float gain_2,
             float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 CHAIN_PARAMETERS) {
    __shared__ unsigned raw[RAW_BYTES / 4 + 8];
    __shared__ unsigned between[MAX_LINES * BETWEEN_PITCH];  // a pixel a word
    __shared__ int extents[4];

    const int *row = regions + (long long)blockIdx.z * REGION_FIELDS;
    const Source source = reinterpret_cast<const Source *>(sources)[2 * row[REGION_IMAGE]];
    const unsigned char *origin = pixels + source.address + row[REGION_Y] * source.pitch +
                                  (long long)(row[REGION_X] * PIXEL_BYTES);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int x_first = blockIdx.x * COLUMNS, y_first = blockIdx.y * LINES, x = x_first + lane;

    const int x_stride = x_limit + 4, y_stride = y_limit + 4;
    const int *x_entries = x_table + ((long long)blockIdx.z * width + x_first) * x_stride;
    const int *y_entries = y_table + ((long long)blockIdx.z * height + y_first) * y_stride;
    const int columns = min(COLUMNS, width - x_first), out_lines = min(LINES, height - y_first);
    const bool in_columns = lane < columns && x_entries[lane * x_stride + 1] > 0;

    // Columns and lines of the source that the block needs.
    if (thread < 4) extents[thread] = thread & 1 ? 0 : 0x7fffffff;
    __syncthreads();
    if (warp == 0 && in_columns) {
        atomicMin(&extents[0], x_entries[lane * x_stride]);
        atomicMax(&extents[1], x_entries[lane * x_stride] + x_entries[lane * x_stride + 1]);
    }
    if (warp == 1 && lane < out_lines && y_entries[lane * y_stride + 1] > 0) {
        atomicMin(&extents[2], y_entries[lane * y_stride]);
        atomicMax(&extents[3], y_entries[lane * y_stride] + y_entries[lane * y_stride + 1]);
    }
    __syncthreads();
    const int left = extents[0], right = extents[1], top = extents[2], bottom = extents[3];
    const bool anything = right > 0 && bottom > 0;
    const int line_bytes = anything ? (right - left) * PIXEL_BYTES : 0;
    // Words of a line in shared memory: four pixels more for the padding of windows, and a word for the shift. Odd, so
    // that the same word of 32 lines lies in 32 banks.
    const int line_words = ((line_bytes + 4 * PIXEL_BYTES + 3) / 4 + 2) | 1;
    const bool fits = line_words <= RAW_BYTES / 4;
    const int lines_at_once = min(MAX_LINES, fits ? RAW_BYTES / 4 / line_words : MAX_LINES);
    const bool across_first = anything && nbv_vertical_first(row[REGION_WIDTH], row[REGION_HEIGHT],
                                                             row[REGION_OUT_WIDTH], row[REGION_OUT_HEIGHT]);

    int sums[OWN][CHANNELS];
#pragma unroll
    for (int o = 0; o < OWN; ++o)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sums[o][c] = 0;

    // `first` counts source lines, or the block's own lines where each is summed across the source first.
    const int stop = across_first ? out_lines : bottom;
    for (int first = across_first ? 0 : top; anything && first < stop; first += lines_at_once) {
        const int lines = min(lines_at_once, stop - first);
        if (fits && across_first) {
            const unsigned char *corner = origin + (long long)left * PIXEL_BYTES;
            for (int at = thread; at < lines * line_bytes; at += THREADS) {
                const int line = at / line_bytes, byte = at - line * line_bytes;
                const int *entry = y_entries + (first + line) * y_stride;
                const unsigned char *from = corner + entry[0] * source.pitch + byte;
                int total = 0;
#pragma unroll 4
                for (int tap = 0; tap < entry[1]; ++tap, from += source.pitch) total += *from * entry[4 + tap];
                reinterpret_cast<unsigned char *>(raw + line * line_words)[byte] = (unsigned char)nbv_round_sum(total);
            }
        } else if (fits) {
            // Whole words, but none without a byte of the window, so nothing outside the allocation is touched.
            for (int line = warp; line < lines; line += WARPS) {
                const unsigned long long address = reinterpret_cast<unsigned long long>(
                    origin + (first + line) * source.pitch + (long long)left * PIXEL_BYTES);
                const unsigned *from = reinterpret_cast<const unsigned *>(address & ~3ull);
                const int words = ((int)(address & 3) + line_bytes + 3) / 4;
                for (int word = lane; word < words; word += 32) raw[line * line_words + word] = __ldg(from + word);
            }
        }
        __syncthreads();
        // Along the lines: a lane has a line, so the weights of a column serve the whole warp.
        for (int column = warp; column < columns; column += WARPS) {
            const int *entry = x_entries + column * x_stride;
            if (entry[1] == 0 || lane >= lines) continue;
            int along[CHANNELS];
            if (fits) {
                const unsigned char *start = origin + (first + lane) * source.pitch + (long long)left * PIXEL_BYTES;
                const int shift = across_first ? 0 : (int)(reinterpret_cast<unsigned long long>(start) & 3);
                sum_line(raw + lane * line_words, shift + (entry[0] - left) * PIXEL_BYTES, entry, along);
            } else if (across_first) {
                sum_far_column(origin, source.pitch, entry, y_entries + (first + lane) * y_stride, along);
            } else {
                sum_far_line(origin + (first + lane) * source.pitch, entry, along);
            }
            between[lane * BETWEEN_PITCH + column] = rounded(along);
        }
        __syncthreads();
        // Across them: a lane has a column.
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
            const int line = warp + o * WARPS;
            if (!in_columns || line >= out_lines) continue;
            const int *entry = y_entries + line * y_stride;
            int from = max(entry[0], first), until = min(entry[0] + entry[1], first + lines);
            if (across_first) {
                from = line;
                until = line >= first && line < first + lines ? line + 1 : line;
            }
#pragma unroll 4
            for (int at = from; at < until; ++at) {
                const int weight = across_first ? 1 << 22 : entry[4 + at - entry[0]];
                const unsigned pixel = between[(at - first) * BETWEEN_PITCH + lane];
                sums[o][0] += (int)(pixel & 255) * weight;
#if CHANNELS == 3
                sums[o][1] += (int)(pixel >> 8 & 255) * weight;
                sums[o][2] += (int)(pixel >> 16) * weight;
#endif
            }
        }
        __syncthreads();
    }
    if (x >= width) return;

    const Shading shading = {{gain_0, gain_1, gain_2}, {bias_0, bias_1, bias_2}, swap};
    const long long plane = (long long)height * width;
    Stored *canvas = out + (long long)blockIdx.z * OUT_CHANNELS * plane;
#pragma unroll
    for (int o = 0; o < OWN; ++o) {
        const int y = y_first + warp + o * WARPS;
        if (y >= height) return;
        float values[3] = {fill_0, fill_1, fill_2};
        if (in_columns && y_entries[(warp + o * WARPS) * y_stride + 1] > 0) {
            values[0] = (float)nbv_round_sum(sums[o][0]);
            values[1] = CHANNELS == 3 ? (float)nbv_round_sum(sums[o][CHANNELS - 2]) : values[0];
            values[2] = CHANNELS == 3 ? (float)nbv_round_sum(sums[o][CHANNELS - 1]) : values[0];
        }
#ifdef CHAIN
        const float numbers[] = {CHAIN_NUMBERS};
        shade_pixel(values, x, y, bgr, numbers);
#endif
        store_pixel(canvas, plane, (long long)y * width + x, values, shading);
    }
}
