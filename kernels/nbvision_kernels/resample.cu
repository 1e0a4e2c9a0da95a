// The resample family's frame: a block makes 32 columns by LINES lines of one canvas. It brings the lines of the source that
// it needs into shared memory, some at a time, and while the next are on their way sums along these, and then across them;
// or, where Pillow does, first across. Weights come from the tap tables of resample.py, along lines as bytes, which is what
// tensor cores multiply exactly; the rounding and the chain are Python functions, linked in.
//
// Compiled with -D: PIXEL_BYTES of the source (1 gray, 3, 4), LINES of a canvas that a block makes, WARPS of a block, the
// fields of regions.py, and those of frame.cuh.
#include "frame.cuh"

extern "C" __device__ int nbv_round_sum(int total);
extern "C" __device__ int nbv_vertical_first(int width, int height, int out_width, int out_height);
#define CHANNELS (PIXEL_BYTES == 1 ? 1 : 3)  // alpha is dropped
// Tensor cores multiply 16 bytes of 16 lines by 8 columns at once. Older cards sum four products an instruction.
#define TENSOR (__CUDA_ARCH__ >= 800)
constexpr int COLUMNS = 32, THREADS = 32 * WARPS;
constexpr int OWN = LINES / WARPS;  // output lines of a thread
// Source lines come in stages: of two, one is summed while the other is on its way, unless both are needed for the lines
// of one. Older cards cannot load past registers, and have one.
constexpr int STAGES = TENSOR ? 2 : 1;
constexpr int STAGE_LINES = TENSOR ? 16 : 32;  // at most: a tile, or a line for each lane
constexpr int STAGE_WORDS = TENSOR ? 15 * 256 : 24 * 256;
constexpr int PADDING = 8 * PIXEL_BYTES;  // words that the last window may read behind it
// Blocks on a multiprocessor: as many as its shared memory holds, or as its registers hold without spilling.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int BLOCKS = PIXEL_BYTES == 1 ? 6 : PIXEL_BYTES == 4 || __CUDA_ARCH__ == 1000 ? 4 : 5;
#else
constexpr int BLOCKS = TENSOR ? 3 : 2;
#endif
constexpr int BETWEEN_PITCH = COLUMNS + 1;

// Groups of four weights in a packed entry: a window starts at a multiple of four pixels, with zeros before its first.
__device__ __forceinline__ int groups_of(const int *entry) {
    return entry[1] == 0 ? 0 : ((entry[0] & 3) + entry[1] + 3) / 4;
}

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

#if TENSOR
// What a lane needs of eight neighbouring columns: its column's weights, and where the windows of all begin and end.
struct Tile {
    const uint4 *weights;
    int groups, group, steps;  // the lane's first group is before its column's first if another column begins earlier
    int word;                  // where the lane's first four pixels are on a line that begins at `left`
};
__device__ __forceinline__ Tile tile_of(const int *entry, int lane, int left) {
    const int begin = entry[0] & ~3, groups = groups_of(entry), quarter = lane % 4;
    const int stop = __reduce_max_sync(~0u, groups == 0 ? 0 : begin + 4 * groups);
    const int start = __reduce_min_sync(~0u, groups == 0 ? stop : begin);
    return {reinterpret_cast<const uint4 *>(entry + 4), groups, (start - begin) / 4 + quarter, (stop - start + 15) / 16,
            ((start - left) / 4 + quarter) * PIXEL_BYTES};
}

// Sums of 16 lines and 8 columns as one product of matrices, by the warp: pixels times weights, which are zero outside a
// column's window. Totals: lines lane / 4 and that + 8, of columns 2 * (lane % 4) and the next, in this order.
__device__ __forceinline__ void sum_tile(const unsigned *upper, const unsigned *lower, const Tile &tile,
                                         int totals[4][CHANNELS]) {
    int sums[CHANNELS][3][4] = {};  // of the weights' low, middle and high bytes
    upper += tile.word;
    lower += tile.word;
    const uint4 none = {0, 0, 0, 0};
    uint4 next = (unsigned)tile.group < tile.groups ? __ldg(tile.weights + tile.group) : none;
#pragma unroll (PIXEL_BYTES == 4 ? 1 : 2)
    for (int step = 0; step < tile.steps; ++step) {
        const uint4 weight = next;  // asked for a step before
        const int group = tile.group + 4 * step + 4;
        next = (unsigned)group < tile.groups ? __ldg(tile.weights + group) : none;
        unsigned above[CHANNELS], below[CHANNELS];
        sort_channels(upper + 4 * PIXEL_BYTES * step, above);
        sort_channels(lower + 4 * PIXEL_BYTES * step, below);
#define MULTIPLY(types, sum, weight)                                                                              \
    asm("mma.sync.aligned.m16n8k16.row.col.s32." types ".s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"   \
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])                                                   \
        : "r"(above[c]), "r"(below[c]), "r"(weight))
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            MULTIPLY("u8.u8", sums[c][0], weight.x);
            MULTIPLY("u8.u8", sums[c][1], weight.y);
            MULTIPLY("u8.s8", sums[c][2], weight.z);
        }
#undef MULTIPLY
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            totals[i][c] = (int)((unsigned)sums[c][0][i] + ((unsigned)sums[c][1][i] << 8) + ((unsigned)sums[c][2][i] << 16));
}

// Lines of the source straight into shared memory: every so manieth by a warp, and all of them under way at once. Blocks of
// 16 bytes, from the one with the line's first byte on, so a line starts up to 15 bytes behind its place.
__device__ __forceinline__ void fetch_lines(const unsigned char *from, long long pitch, int line_bytes, int lines,
                                            unsigned *to, int line_words, int lane) {
    const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
#pragma unroll 1
    for (int byte = 16 * lane; byte < line_bytes + 15; byte += 16 * 32) {
        const unsigned char *line_from = from;
#pragma unroll
        for (int line = 0; line < STAGE_LINES; line += WARPS, line_from += WARPS * pitch) {
            const int shift = (int)(reinterpret_cast<unsigned long long>(line_from) & 15);
            const int left = shift + line_bytes - byte;  // nothing behind the line is read, be it within the block
            if (line < lines && left > 0)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared + byte + 4 * line * line_words),
                             "l"(line_from - shift + byte), "r"(min(left, 16))
                             : "memory");
        }
    }
}

// Moves fetched lines to their places.
__device__ __forceinline__ void align_lines(const unsigned char *from, long long pitch, int line_bytes, int lines,
                                            unsigned *to, int line_words, int lane) {
    if (((reinterpret_cast<unsigned long long>(from) | pitch) & 15) == 0) return;
    const int words = (line_bytes + 3) / 4;
#pragma unroll 1
    for (int line = 0; line < lines; line += WARPS, from += WARPS * pitch, to += WARPS * line_words) {
        const int shift = (int)(reinterpret_cast<unsigned long long>(from) & 15), last = (shift + line_bytes - 1) / 4;
        for (int word = lane; word - lane < words; word += 32) {
            unsigned moved = 0;
            const int at = word + shift / 4;  // the word behind the last one may be another warp's line
            if (word < words) moved = __funnelshift_r(to[at], to[min(at + 1, last)], 8 * shift);
            __syncwarp();
            if (word < words) to[word] = moved;
            __syncwarp();
        }
    }
}
#endif

// The sum of one line and column, four products at once.
__device__ __forceinline__ void sum_line(const unsigned *words, const int *entry, int *totals) {
    const uint4 *weights = reinterpret_cast<const uint4 *>(entry + 4);
    const int groups = groups_of(entry);
    unsigned low[CHANNELS] = {}, middle[CHANNELS] = {};
    int high[CHANNELS] = {};
#pragma unroll 2
    for (int group = 0; group < groups; ++group, words += PIXEL_BYTES) {
        unsigned four[CHANNELS];
        sort_channels(words, four);
        const uint4 weight = __ldg(weights + group);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            low[c] = __dp4a(four[c], weight.x, low[c]);
            middle[c] = __dp4a(four[c], weight.y, middle[c]);
            asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(high[c]) : "r"(four[c]), "r"(weight.z));
        }
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) totals[c] = (int)(low[c] + (middle[c] << 8)) + (high[c] << 16);
}

// A line of the source into shared memory, by the warp. Whole words, but none without a byte of the window, so nothing
// outside the allocation is touched.
__device__ __forceinline__ void load_line(const unsigned char *from, int line_bytes, unsigned *to, int lane) {
    const int shift = (int)(reinterpret_cast<unsigned long long>(from) & 3), last = (shift + line_bytes - 1) / 4;
    const unsigned *words = reinterpret_cast<const unsigned *>(from - shift);
    for (int word = lane; word < (line_bytes + 3) / 4; word += 32)
        to[word] = __funnelshift_r(__ldg(words + word), __ldg(words + min(word + 1, last)), 8 * shift);
}

// One weight of a packed entry.
__device__ __forceinline__ int weight_of(const int *entry, int tap) {
    tap += entry[0] & 3;
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    resample(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
             const int *__restrict__ x_table, const int *__restrict__ y_table, int x_limit, int y_limit, int width_first,
             Stored *__restrict__ out, int height, int width, int swap, float gain_0, float gain_1, float gain_2,
             float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 CHAIN_PARAMETERS) {
    __shared__ alignas(16) unsigned stages[STAGES * (STAGE_WORDS + PADDING)];
    __shared__ unsigned between[STAGE_LINES * BETWEEN_PITCH];  // a pixel a word
    __shared__ int2 line_windows[LINES];                       // where each output line's begins and ends

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

    // What the block needs of the source lies between the windows of its first and last column and line in the region.
    const int x_begin = max(row[REGION_LEFT] - x_first, 0), y_begin = max(row[REGION_TOP] - y_first, 0);
    const int x_last = min(row[REGION_LEFT] + row[REGION_OUT_WIDTH] - x_first, columns) - 1;
    const int y_last = min(row[REGION_TOP] + row[REGION_OUT_HEIGHT] - y_first, out_lines) - 1;
    const bool anything = x_begin <= x_last && y_begin <= y_last, in_columns = lane >= x_begin && lane <= x_last;
    int left = 0, right = 0, top = 0, bottom = 0;
    if (anything) {
        left = x_entries[x_begin * x_stride] & ~15;
        right = x_entries[x_last * x_stride] + x_entries[x_last * x_stride + 1];
        top = y_entries[y_begin * y_stride];
        bottom = y_entries[y_last * y_stride] + y_entries[y_last * y_stride + 1];
    }
    const int line_bytes = (right - left) * PIXEL_BYTES;
    // Words of a line in shared memory, such that what a warp reads at once, of eight lines or of 32, lies in 32 banks.
    int line_words = (line_bytes + 15 + 15) / 16 * 4;  // 15 bytes are those of a block before the first
    if (!TENSOR) line_words |= 1;
    else if (PIXEL_BYTES == 4) line_words = (line_words + 15) / 32 * 32 + 16;
    else line_words = (line_words + 3) / 8 * 8 + 4;
    const bool fits = line_words <= STAGES * STAGE_WORDS;
    const bool has_two = STAGES == 2 && line_words * STAGE_LINES <= STAGE_WORDS;
    const int lines_at_once = fits ? min(STAGE_LINES, (has_two ? 1 : STAGES) * STAGE_WORDS / line_words) : STAGE_LINES;
    if (thread < out_lines) {
        const int *entry = y_entries + thread * y_stride;
        line_windows[thread] = make_int2(entry[0], entry[0] + entry[1]);
    }
    const bool across_first = anything && !width_first &&
                              nbv_vertical_first(row[REGION_WIDTH], row[REGION_HEIGHT], row[REGION_OUT_WIDTH],
                                                 row[REGION_OUT_HEIGHT]);

    int sums[OWN][CHANNELS] = {};
    // Adds what `between` has of source lines first .. first + lines to the thread's column of its output lines.
    const auto sum_across = [&](int first, int lines) {
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
            const int line = warp + o * WARPS;
            if (!in_columns || line < y_begin || line > y_last) continue;
            const int2 window = line_windows[line];
            const int until = min(window.y, first + lines), *weights = y_entries + line * y_stride + 4 - window.x;
#pragma unroll 4
            for (int at = max(window.x, first); at < until; ++at) {
                const unsigned pixel = between[(at - first) * BETWEEN_PITCH + lane];
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) sums[o][c] += (int)(pixel >> 8 * c & 255) * __ldg(weights + at);
            }
        }
    };
#if TENSOR
    const int tile_column = 8 * warp;
    if (anything && fits && !across_first) {
        const Tile tile = tile_of(x_entries + min(tile_column + lane / 4, columns - 1) * x_stride, lane, left);
        const unsigned char *from = origin + (top + warp) * source.pitch + (long long)left * PIXEL_BYTES;
        const int own = warp * line_words;
        const auto fetch = [&](int first, unsigned *stage) {
            const int lines = min(lines_at_once, bottom - first);
            fetch_lines(from, source.pitch, line_bytes, lines - warp, stage + own, line_words, lane);
        };
        unsigned *raw = stages, *other = has_two ? stages + STAGE_WORDS + PADDING : stages;
        fetch(top, raw);
#pragma unroll 1
        for (int first = top; first < bottom; first += lines_at_once) {
            const int lines = min(lines_at_once, bottom - first), next = first + lines;
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncwarp();
            align_lines(from, source.pitch, line_bytes, lines - warp, raw + own, line_words, lane);
            __syncthreads();  // these lines are there, and nobody reads `between`, or the other stage, any more
            from += lines * source.pitch;
            if (has_two && next < bottom) fetch(next, other);
            // Along the lines: a warp has a tile.
            if (tile_column < columns) {
                const unsigned *upper = raw + min(lane / 4, lines - 1) * line_words;
                const unsigned *lower = raw + min(lane / 4 + 8, lines - 1) * line_words;
                int totals[4][CHANNELS];
                sum_tile(upper, lower, tile, totals);
                unsigned *to = between + lane / 4 * BETWEEN_PITCH + tile_column + lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i / 2 * 8 * BETWEEN_PITCH + i % 2] = rounded(totals[i]);
            }
            __syncthreads();
            if (!has_two && next < bottom) fetch(next, raw);
            sum_across(first, lines);
            unsigned *summed = raw;
            raw = other;
            other = summed;
        }
    } else
#endif
    if (anything) {
        // `first` counts source lines, or the block's own lines where each is summed across the source first.
        const int stop = across_first ? out_lines : bottom;
#pragma unroll 1
        for (int first = across_first ? 0 : top; first < stop; first += lines_at_once) {
            const int lines = min(lines_at_once, stop - first);
            unsigned *raw = stages;
            const unsigned char *corner = origin + (long long)left * PIXEL_BYTES;
            if (fits && across_first) {
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
                for (int line = warp; line < lines; line += WARPS)
                    load_line(corner + (first + line) * source.pitch, line_bytes, raw + line * line_words, lane);
            }
            __syncthreads();
            // A lane has a line, so the weights of a column serve the whole warp.
#pragma unroll 1
            for (int column = warp; column < columns; column += WARPS) {
                const int *entry = x_entries + column * x_stride;
                if (entry[1] == 0 || lane >= lines) continue;
                int along[CHANNELS];
                if (fits)
                    sum_line(raw + lane * line_words + ((entry[0] & ~3) - left) / 4 * PIXEL_BYTES, entry, along);
                else if (across_first)
                    sum_far_column(origin, source.pitch, entry, y_entries + (first + lane) * y_stride, along);
                else
                    sum_far_line(origin + (first + lane) * source.pitch, entry, along);
                between[lane * BETWEEN_PITCH + column] = rounded(along);
            }
            __syncthreads();
            if (!across_first) {
                sum_across(first, lines);
                continue;
            }
#pragma unroll
            for (int o = 0; o < OWN; ++o) {  // nothing is left to sum
                const int line = warp + o * WARPS;
                if (!in_columns || line < max(y_begin, first) || line > min(y_last, first + lines - 1)) continue;
                const unsigned pixel = between[(line - first) * BETWEEN_PITCH + lane];
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) sums[o][c] = (int)(pixel >> 8 * c & 255) << 22;
            }
        }
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
        const int line = warp + o * WARPS;
        if (in_columns && line >= y_begin && line <= y_last) {
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
