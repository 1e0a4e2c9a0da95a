// The resample family's frame: a block makes 32 columns by LINES lines of one canvas. It brings the lines of the source that
// it needs into shared memory, some at a time, and while the next are on their way sums along these, and then across them;
// or, where Pillow does, first across. Weights come from the tap tables of resample.py, packed in bytes, which is what
// tensor cores multiply exactly; the rounding and the chain are Python functions, linked in.
//
// Compiled with -D: PIXEL_BYTES of the source (1 gray, 3, 4), LINES of a canvas that a block makes, WARPS of a block,
// WEIGHT_BITS of a weight in fixed point, the fields of regions.py, and those of frame.cuh.
#include "frame.cuh"

extern "C" __device__ int nbv_saturate_sum(int total);
extern "C" __device__ int nbv_vertical_first(int width, int height, int out_width, int out_height);
#define CHANNELS (PIXEL_BYTES == 1 ? 1 : 3)  // alpha is dropped
// Tensor cores multiply 32 bytes of 16 lines by 8 columns at once. Older cards sum four products an instruction.
#define TENSOR (__CUDA_ARCH__ >= 800)
constexpr int ROUND = 1 << (WEIGHT_BITS - 1);  // where every sum begins
constexpr int COLUMNS = 32, THREADS = 32 * WARPS;
constexpr int OWN = LINES / WARPS;  // output lines of a thread
// Blocks on a multiprocessor: as many as its shared memory holds, or as its registers hold without spilling.
#if __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int BLOCKS = PIXEL_BYTES == 4 ? 3 : 4, STAGE_WORDS = 15 * 256;
#define TABLES 1
#elif TENSOR
constexpr int BLOCKS = 3, STAGE_WORDS = 15 * 256;
#else
constexpr int BLOCKS = 2, STAGE_WORDS = 24 * 256;
#endif
// Tap tables of a block's columns and lines in shared memory, as the first cache loses them: up to lanczos, 1080p to 224.
#ifndef TABLES
#define TABLES 0
#endif
constexpr int TABLE_WORDS = COLUMNS * (64 + 4) + LINES * (40 + 4);
// Source lines come in stages: of two, one is summed while the other is on its way, unless both are needed for the lines
// of one. Older cards cannot load past registers, and have one.
constexpr int STAGES = TENSOR ? 2 : 1;
constexpr int STAGE_LINES = TENSOR ? 16 : 32;    // at most: a tile, or a line for each lane
constexpr int PADDING = 12 * PIXEL_BYTES;        // words that the last window may read behind a stage
constexpr int BETWEEN_PITCH = TENSOR ? 16 : 36;  // bytes of a column; a warp reads 32 banks

// Weights lie in groups of eight: two words of their low bytes, two of the middle ones, two of the high ones, and two that
// are not used. A window starts at a multiple of eight, with zeros before its first weight.
__device__ __forceinline__ int groups_of(const int *entry) {
    return entry[1] == 0 ? 0 : ((entry[0] & 7) + entry[1] + 7) / 8;
}

struct Four {  // the bytes of four weights
    unsigned low, middle, high;
};
// Where they are in an entry, counted from the first of its first group; `tap` is a multiple of four.
__device__ __forceinline__ unsigned word_of(unsigned tap) { return 4 + (tap & ~7u) + (tap >> 2 & 1); }
__device__ __forceinline__ Four four_of(const int *entry, unsigned tap) {
    const unsigned *words = reinterpret_cast<const unsigned *>(entry) + word_of(tap);
    return {__ldg(words), __ldg(words + 2), __ldg(words + 4)};
}

// Adds the sum of four bytes with their weights.
__device__ __forceinline__ int add_four(int total, unsigned bytes, Four weights) {
    int high;
    asm("dp4a.u32.s32 %0, %1, %2, 0;" : "=r"(high) : "r"(bytes), "r"(weights.high));
    return total + (int)(__dp4a(bytes, weights.low, 0u) + (__dp4a(bytes, weights.middle, 0u) << 8)) + (high << 16);
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
struct alignas(PIXEL_BYTES == 4 ? 16 : 8) Pixels {  // eight
    unsigned words[2 * PIXEL_BYTES];
};

// What a lane needs of eight neighbouring columns: its column's weights, and how far the windows of all reach together.
struct Tile {
    unsigned at;  // bytes from the block's tables to the lane's first weights
    int tap;      // what number these have in its column's entry; less than 0 if another column begins earlier
    int steps;
    int word;  // where the lane's first eight pixels are on a line that begins at `left`
};
__device__ __forceinline__ Tile tile_of(const int *entries, int entry, int lane, int left) {
    const int begin = entries[entry] & ~7, groups = groups_of(entries + entry), quarter = lane % 4;
    const int stop = __reduce_max_sync(~0u, groups == 0 ? left : begin + 8 * groups);
    const int start = __reduce_min_sync(~0u, groups == 0 ? stop : begin), tap = start - begin + 8 * quarter;
    return {4u * (entry + 4 + tap), tap, (stop - start + 31) / 32, ((start - left) / 8 + quarter) * 2 * PIXEL_BYTES};
}

// Sums of products that lanes hold a part of, as tensor cores lay them out: lines lane / 4 and that + 8, of columns
// 2 * (lane % 4) and the next, in this order; of the weights' low, middle and high bytes.
struct Sums {
    int bytes[3][4];
};
__device__ __forceinline__ int total_of(const Sums &sums, int i) {
    return (int)((unsigned)sums.bytes[0][i] + ((unsigned)sums.bytes[1][i] << 8) + ((unsigned)sums.bytes[2][i] << 16));
}

// 16 lines of 32 pixels times 32 pixels of 8 columns: the lane's 8 pixels of two lines, and their weights.
#define ALONG(types, sum, first, second)                                                                                   \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." types                                                                     \
        ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                             \
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])                                                           \
        : "r"(above[0][c]), "r"(below[0][c]), "r"(above[1][c]), "r"(below[1][c]), "r"(first), "r"(second))

// Sums of 16 lines and 8 columns as one product of matrices, by the warp: pixels times weights, which are zero outside a
// column's window.
__device__ __forceinline__ void sum_tile(const unsigned *upper, const unsigned *lower, const Tile &tile, const int *entries,
                                         int limit, Sums *sums) {
    upper += tile.word;
    lower += tile.word;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        sums[c] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c].bytes[0][i] = ROUND;
    }
    unsigned at = tile.at;
    int tap = tile.tap, steps = tile.steps;
#pragma unroll 1
    do {
        uint4 low_middle = {0, 0, 0, 0};
        uint2 high = {0, 0};
        if ((unsigned)tap < limit) {
            const char *weights = reinterpret_cast<const char *>(entries) + at;
            low_middle = *reinterpret_cast<const uint4 *>(weights);
            high = *reinterpret_cast<const uint2 *>(weights + 16);
        }
        at += 4 * 32;
        tap += 32;
        unsigned above[2][CHANNELS], below[2][CHANNELS];
        const auto sort = [&](const unsigned *line, unsigned eight[2][CHANNELS]) {
            const Pixels pixels = *reinterpret_cast<const Pixels *>(line);
            sort_channels(pixels.words, eight[0]);
            sort_channels(pixels.words + PIXEL_BYTES, eight[1]);
        };
        sort(upper, above);
        sort(lower, below);
        upper += 8 * PIXEL_BYTES;
        lower += 8 * PIXEL_BYTES;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            ALONG("u8.u8", sums[c].bytes[0], low_middle.x, low_middle.y);
            ALONG("u8.u8", sums[c].bytes[1], low_middle.z, low_middle.w);
            ALONG("u8.s8", sums[c].bytes[2], high.x, high.y);
        }
    } while (--steps > 0);
}
#undef ALONG

// 16 bytes straight into shared memory, or fewer and zeros.
__device__ __forceinline__ void fetch_block(unsigned to, const unsigned char *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void fetch_block(unsigned to, const unsigned char *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Lines of the source: a warp has every fourth or so (WARPS), and all of them are under way at once. `from`, `to` and `lines` count from
// the warp's first line. These begin where a block of 16 bytes does, and are of whole ones, but for the last.
__device__ __forceinline__ void fetch_lines(const unsigned char *from, long long pitch, int line_bytes, int lines,
                                            unsigned to, int line_words, int lane) {
    constexpr int AHEAD = 16 * 32;  // bytes of a warp, which are asked for in twos
    const int whole = line_bytes & ~15;
    const unsigned char *at = from + 16 * lane;
    unsigned at_to = to + 16 * lane;
#pragma unroll 1
    for (int byte = 16 * lane; byte < whole; byte += 2 * AHEAD, at += 2 * AHEAD, at_to += 2 * AHEAD) {
        const unsigned char *line_at = at;
        unsigned line_to = at_to;
        const bool two = byte + AHEAD < whole;
#pragma unroll
        for (int line = 0; line < STAGE_LINES; line += WARPS, line_at += WARPS * pitch, line_to += 4 * WARPS * line_words) {
            if (line < lines) fetch_block(line_to, line_at);
            if (line < lines && two) fetch_block(line_to + AHEAD, line_at + AHEAD);
        }
    }
    const int line = WARPS * lane;
    if (whole < line_bytes && line < STAGE_LINES && line < lines)
        fetch_block(to + whole + 4 * line * line_words, from + whole + line * pitch, line_bytes - whole);
}

// The same where every line begins elsewhere in a block: up to 15 bytes behind its place.
__device__ __forceinline__ void fetch_shifted_lines(const unsigned char *from, long long pitch, int line_bytes, int lines,
                                                    unsigned to, int line_words, int lane) {
#pragma unroll 1
    for (int line = 0; line < min(lines, STAGE_LINES); line += WARPS, from += WARPS * pitch, to += 4 * WARPS * line_words) {
        const int shift = (int)(reinterpret_cast<unsigned long long>(from) & 15), stop = shift + line_bytes;
        for (int byte = 16 * lane; byte < stop; byte += 16 * 32)
            fetch_block(to + byte, from - shift + byte, min(stop - byte, 16));
    }
}

// A table into shared memory, by all threads, 16 bytes at a time.
__device__ __forceinline__ void copy_table(const int *from, int words, int *to, int thread) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(from);
#pragma unroll 1
    for (int byte = 16 * thread; byte < 4 * words; byte += 16 * THREADS) fetch_block(at + byte, bytes + byte);
}

// Moves fetched lines to their places.
__device__ __forceinline__ void align_lines(const unsigned char *from, long long pitch, int line_bytes, int lines,
                                            unsigned *to, int line_words, int lane) {
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

// An entry's weights of four source lines, of which the first is a multiple of four; from shared memory or from the table.
__device__ __forceinline__ Four weights_at(const int *entries, unsigned entry, int begin, int limit, int line) {
    const unsigned tap = line - begin;
    if (tap >= limit) return {0, 0, 0};
    const unsigned byte = 4 * (entry + word_of(tap));  // 32 bits of it save three instructions
    const unsigned *words = reinterpret_cast<const unsigned *>(reinterpret_cast<const char *>(entries) + byte);
    return {words[0], words[2], words[4]};
}
#endif

// The sum of one line and column, four products at once.
__device__ __forceinline__ void sum_line(const unsigned *words, const int *entry, int *totals) {
    const int fours = 2 * groups_of(entry);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) totals[c] = ROUND;
#pragma unroll 2
    for (int index = 0; index < fours; ++index, words += PIXEL_BYTES) {
        unsigned four[CHANNELS];
        sort_channels(words, four);
        const Four weights = four_of(entry, 4 * index);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) totals[c] = add_four(totals[c], four[c], weights);
    }
}

// A line of the source into shared memory, by the warp. Whole words, but none without a byte of the line, so nothing
// outside the allocation is touched.
__device__ __forceinline__ void load_line(const unsigned char *from, int line_bytes, unsigned *to, int lane) {
    const int shift = (int)(reinterpret_cast<unsigned long long>(from) & 3), last = (shift + line_bytes - 1) / 4;
    const unsigned *words = reinterpret_cast<const unsigned *>(from - shift);
    for (int word = lane; word < (line_bytes + 3) / 4; word += 32)
        to[word] = __funnelshift_r(__ldg(words + word), __ldg(words + min(word + 1, last)), 8 * shift);
}

// The sum of any window of bytes that `byte_at` gives, none outside it.
template <typename ByteAt>
__device__ __forceinline__ int sum_window(const int *entry, ByteAt byte_at) {
    const int first = entry[0], last = first + entry[1] - 1, begin = first & ~7;
    int total = ROUND;
#pragma unroll 1
    for (int at = first & ~3; at <= last; at += 4) {
        unsigned bytes = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) bytes |= byte_at(min(max(at + k, first), last)) << 8 * k;  // outside the weight is zero
        total = add_four(total, bytes, four_of(entry, at - begin));
    }
    return total;
}

// Across the source: the sum of a byte of each line.
__device__ __forceinline__ int sum_down(const unsigned char *from, long long pitch, const int *entry) {
    return sum_window(entry, [&](int line) { return (unsigned)from[line * pitch]; });
}

// The lines of a canvas that a block makes at once, and what of the source they need.
struct Lines {
    const int *entries;  // of their tap table
    int first, count, begin, last;  // those from `begin` to `last` lie in the region
    int top, bottom;  // of the source
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    resample(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
             const int *__restrict__ x_table, const int *__restrict__ y_table, int x_limit, int y_limit, int width_first,
             Stored *__restrict__ out, int height, int width, int swap, float gain_0, float gain_1, float gain_2,
             float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 CHAIN_PARAMETERS) {
    __shared__ alignas(16) unsigned stages[STAGES * (STAGE_WORDS + PADDING)];
    __shared__ alignas(16) unsigned char between[CHANNELS * COLUMNS * BETWEEN_PITCH];  // a column's lines side by side

    const int *row = regions + (long long)blockIdx.z * REGION_FIELDS;
    const Source source = reinterpret_cast<const Source *>(sources)[2 * row[REGION_IMAGE]];
    const unsigned char *origin =
        pixels + source.address + row[REGION_Y] * source.pitch + (long long)(row[REGION_X] * PIXEL_BYTES);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int x_first = blockIdx.x * COLUMNS, x = x_first + lane;
    const int x_stride = x_limit + 4, y_stride = y_limit + 4;
    const int *x_entries = x_table + ((long long)blockIdx.z * width + x_first) * x_stride;

    // What the block needs of the source lies between the windows of its first and last column and line in the region.
    const int columns = min(COLUMNS, width - x_first), x_begin = max(row[REGION_LEFT] - x_first, 0);
    const int x_last = min(row[REGION_LEFT] + row[REGION_OUT_WIDTH] - x_first, columns) - 1;
    int left = 0, right = 0;
    if (x_begin <= x_last) {
        left = x_entries[x_begin * x_stride] & ~15;
        right = x_entries[x_last * x_stride] + x_entries[x_last * x_stride + 1];
    }
    // Whole blocks of 16 bytes, as far as the image goes: a block that is not whole takes another instruction of each line.
    const int row_bytes = ((int)sources[4 * row[REGION_IMAGE] + 3] - row[REGION_X] - left) * PIXEL_BYTES;
    const int line_bytes = min((right - left) * PIXEL_BYTES + 15 & ~15, row_bytes);
    // Words of a line in shared memory, such that what a warp reads at once, of eight lines or of 32, lies in all banks.
    int line_words = (line_bytes + 15 + 15) / 16 * 4;  // 15 bytes are those of a block before the first
    if (!TENSOR)
        line_words |= 1;
    else if (PIXEL_BYTES == 4)
        line_words = (line_words + 3) / 8 * 8 + 4;
    else
        line_words = (line_words + 7) / 16 * 16 + 8;
    const bool fits = 4 * line_words <= STAGES * STAGE_WORDS;  // lines are summed across by fours
    const bool has_two = STAGES == 2 && line_words * STAGE_LINES <= STAGE_WORDS;
    const int lines_at_once = fits ? min(STAGE_LINES, (has_two ? 1 : STAGES) * STAGE_WORDS / line_words & ~3) : STAGE_LINES;
    const bool across_first = !width_first && nbv_vertical_first(row[REGION_WIDTH], row[REGION_HEIGHT],
                                                                 row[REGION_OUT_WIDTH], row[REGION_OUT_HEIGHT]);
    const auto lines_from = [&](int first) {
        const int *entries = y_table + ((long long)blockIdx.z * height + first) * y_stride;
        const int count = min(LINES, height - first), begin = max(row[REGION_TOP] - first, 0);
        const int last = min(row[REGION_TOP] + row[REGION_OUT_HEIGHT] - first, count) - 1;
        if (x_begin > x_last || begin > last) return Lines{entries, first, count, begin, last, 0, 0};
        const int *last_entry = entries + last * y_stride;
        return Lines{entries, first, count, begin, last, entries[begin * y_stride] & ~3, last_entry[0] + last_entry[1]};
    };
    // `made` is the thread's column of its lines, and may hold anything outside the region.
    const auto store = [&](const Lines &lines, const int (*made)[CHANNELS]) {
        const Shading shading = {{gain_0, gain_1, gain_2}, {bias_0, bias_1, bias_2}, swap};
        const long long plane = (long long)height * width;
        Stored *canvas = out + (long long)blockIdx.z * OUT_CHANNELS * plane;
        const bool in_columns = lane >= x_begin && lane <= x_last;
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
            const int line = warp + o * WARPS, y = lines.first + line;
            if (x >= width || y >= height) break;
            float values[3] = {fill_0, fill_1, fill_2};
            if (in_columns && line >= lines.begin && line <= lines.last)
#pragma unroll
                for (int c = 0; c < 3; ++c) values[c] = (float)made[o][CHANNELS == 3 ? c : 0];
#ifdef CHAIN
            const float numbers[] = {CHAIN_NUMBERS};
            shade_pixel(values, x, y, bgr, numbers);
#endif
            store_pixel(canvas, plane, (long long)y * width + x, values, shading);
        }
    };

#if TENSOR
    if (fits && !across_first) {
        const int tile_column = 8 * warp, line_of_lane = lane / 4, quarter = lane % 4;
        const Tile tile = tile_of(x_entries, min(tile_column + line_of_lane, columns - 1) * x_stride, lane, left);
        const unsigned stages_at = (unsigned)__cvta_generic_to_shared(stages);
        const bool same_shift = source.pitch % 16 == 0;
#if TABLES
        __shared__ alignas(16) int tables[TABLE_WORDS];
        const bool in_tables = COLUMNS * x_stride + LINES * y_stride <= TABLE_WORDS;
        int *y_copy = tables + COLUMNS * x_stride;
        const int *x_weights = in_tables ? tables : x_entries;
        if (in_tables && x_begin <= x_last) copy_table(x_entries, columns * x_stride, tables, thread);
#else
        const int *x_weights = x_entries;
#endif
#pragma unroll 1
        for (int y_first = blockIdx.y * LINES; y_first < height; y_first += gridDim.y * LINES) {
            const Lines lines_to_make = lines_from(y_first);
            const int top = lines_to_make.top, bottom = lines_to_make.bottom;
            const int *y_weights = lines_to_make.entries;
            __syncthreads();  // nobody reads what was made before
            if (top < bottom) {
                const int upper_entry = min(line_of_lane, lines_to_make.count - 1) * y_stride;
                const int lower_entry = min(line_of_lane + 8, lines_to_make.count - 1) * y_stride;
                const int upper_begin = y_weights[upper_entry] & ~7, lower_begin = y_weights[lower_entry] & ~7;
#if TABLES
                if (in_tables) {
                    copy_table(y_weights, lines_to_make.count * y_stride, y_copy, thread);
                    y_weights = y_copy;
                }
#endif
                const unsigned char *from = origin + (top + warp) * source.pitch + (long long)left * PIXEL_BYTES;
                const int shift = (int)(reinterpret_cast<unsigned long long>(from) & 15);
                const bool in_place = same_shift && shift == 0;
                const auto fetch = [&](int first, int stage) {
                    const int lines = min(lines_at_once, bottom - first) - warp;
                    const unsigned to = stages_at + 4 * (stage * (STAGE_WORDS + PADDING) + warp * line_words);
                    if (same_shift)
                        fetch_lines(from - shift, source.pitch, line_bytes + shift, lines, to, line_words, lane);
                    else
                        fetch_shifted_lines(from, source.pitch, line_bytes, lines, to, line_words, lane);
                };
                // The warp's columns of `between`: what it sums along the lines is all that it sums across them.
                unsigned char *mine = between + tile_column * BETWEEN_PITCH;
                unsigned char *to = mine + 2 * quarter * BETWEEN_PITCH + line_of_lane;
                const auto put = [&](int c, int i, int total) {
                    to[(c * COLUMNS + i % 2) * BETWEEN_PITCH + i / 2 * 8] = (unsigned char)nbv_saturate_sum(total);
                };
                int across[CHANNELS][4];
#pragma unroll
                for (int i = 0; i < 4 * CHANNELS; ++i) across[i / 4][i % 4] = ROUND;
                int stage = 0;
                fetch(top, stage);
#pragma unroll 1
                for (int first = top; first < bottom; first += lines_at_once) {
                    const int lines = min(lines_at_once, bottom - first), next = first + lines;
                    const int next_stage = has_two ? stage ^ 1 : stage;
                    unsigned *raw = stages + stage * (STAGE_WORDS + PADDING);
                    asm volatile("cp.async.wait_all;" ::: "memory");
                    __syncwarp();
                    if (!in_place)
                        align_lines(from, source.pitch, line_bytes, lines - warp, raw + warp * line_words, line_words, lane);
                    __syncthreads();  // these lines are there, and nobody reads the other stage any more
                    from += lines * source.pitch;
                    if (has_two && next < bottom) fetch(next, next_stage);
                    if (tile_column < columns) {
                        Sums along[CHANNELS];
                        sum_tile(raw + min(line_of_lane, lines - 1) * line_words,
                                 raw + min(line_of_lane + 8, lines - 1) * line_words, tile, x_weights, x_limit, along);
                        const int line = 4 * quarter < lines ? first + 4 * quarter : -8;
                        const Four upper = weights_at(y_weights, upper_entry, upper_begin, y_limit, line);
                        const Four lower = weights_at(y_weights, lower_entry, lower_begin, y_limit, line);
#pragma unroll
                        for (int i = 0; i < 4 * CHANNELS; ++i) put(i / 4, i % 4, total_of(along[i / 4], i % 4));
                        __syncwarp();
                        // 16 output lines of 16 source lines times 16 source lines of 8 columns.
#pragma unroll
                        for (int c = 0; c < CHANNELS; ++c) {
                            const unsigned char *column = mine + (c * COLUMNS + line_of_lane) * BETWEEN_PITCH;
                            const unsigned four = reinterpret_cast<const unsigned *>(column)[quarter];
#define ACROSS(types, sum, above, below)                                                                                   \
    asm("mma.sync.aligned.m16n8k16.row.col.s32." types ".s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"          \
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])                                                           \
        : "r"(above), "r"(below), "r"(four))
                            Sums sums = {};
#pragma unroll
                            for (int i = 0; i < 4; ++i) sums.bytes[0][i] = across[c][i];
                            ACROSS("u8.u8", sums.bytes[0], upper.low, lower.low);
                            ACROSS("u8.u8", sums.bytes[1], upper.middle, lower.middle);
                            ACROSS("s8.u8", sums.bytes[2], upper.high, lower.high);
#pragma unroll
                            for (int i = 0; i < 4; ++i) across[c][i] = total_of(sums, i);
#undef ACROSS
                        }
                        __syncwarp();
                    }
                    if (!has_two && next < bottom) {
                        __syncthreads();
                        fetch(next, stage);
                    }
                    stage = next_stage;
                }
                if (tile_column < columns)
#pragma unroll
                    for (int i = 0; i < 4 * CHANNELS; ++i) put(i / 4, i % 4, across[i / 4][i % 4]);
                __syncthreads();
            }
            int made[OWN][CHANNELS];
#pragma unroll
            for (int o = 0; o < OWN; ++o)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    made[o][c] = between[(c * COLUMNS + lane) * BETWEEN_PITCH + warp + o * WARPS];
            store(lines_to_make, made);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");  // of a block without lines the table is still on its way
        return;
    }
#endif
#pragma unroll 1
    for (int y_first = blockIdx.y * LINES; y_first < height; y_first += gridDim.y * LINES) {
        const Lines lines_to_make = lines_from(y_first);
        const int *y_entries = lines_to_make.entries;
        int sums[OWN][CHANNELS];
#pragma unroll
        for (int i = 0; i < OWN * CHANNELS; ++i) sums[i / CHANNELS][i % CHANNELS] = ROUND;
        // `first` counts source lines, or the block's own lines where each is summed across the source first.
        const int stop = across_first && lines_to_make.bottom > 0 ? lines_to_make.count : lines_to_make.bottom;
        const unsigned char *corner = origin + (long long)left * PIXEL_BYTES;
#pragma unroll 1
        for (int first = across_first ? 0 : lines_to_make.top; first < stop; first += lines_at_once) {
            const int lines = min(lines_at_once, stop - first);
            __syncthreads();  // nobody reads what was made before
            if (fits && across_first) {
                for (int at = thread; at < lines * line_bytes; at += THREADS) {
                    const int line = at / line_bytes, byte = at - line * line_bytes;
                    reinterpret_cast<unsigned char *>(stages + line * line_words)[byte] = (unsigned char)nbv_saturate_sum(
                        sum_down(corner + byte, source.pitch, y_entries + (first + line) * y_stride));
                }
            } else if (fits) {
                for (int line = warp; line < lines; line += WARPS)
                    load_line(corner + (first + line) * source.pitch, line_bytes, stages + line * line_words, lane);
            }
            __syncthreads();
            // A lane has a line, so the weights of a column serve the whole warp.
#pragma unroll 1
            for (int column = warp; column < columns; column += WARPS) {
                const int *entry = x_entries + column * x_stride;
                if (entry[1] == 0 || lane >= lines) continue;
                int along[CHANNELS];
                if (fits) {
                    sum_line(stages + lane * line_words + ((entry[0] & ~7) - left) / 4 * PIXEL_BYTES, entry, along);
                } else {  // straight from the source, each byte summed across it first if need be
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) {
                        const unsigned char *channel = origin + c;
                        along[c] = sum_window(entry, [&](int at) {
                            const unsigned char *byte = channel + (long long)at * PIXEL_BYTES;
                            if (!across_first) return (unsigned)byte[(first + lane) * source.pitch];
                            return (unsigned)nbv_saturate_sum(
                                sum_down(byte, source.pitch, y_entries + (first + lane) * y_stride));
                        });
                    }
                }
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    between[(c * COLUMNS + column) * BETWEEN_PITCH + lane] = (unsigned char)nbv_saturate_sum(along[c]);
            }
            __syncthreads();
#pragma unroll
            for (int o = 0; o < OWN; ++o) {
                const int line = warp + o * WARPS;
                if (lane < x_begin || lane > x_last || line < lines_to_make.begin || line > lines_to_make.last) continue;
                const unsigned char *column = between + lane * BETWEEN_PITCH;
                if (across_first) {  // nothing is left to sum
                    if (line >= first && line < first + lines)
#pragma unroll
                        for (int c = 0; c < CHANNELS; ++c)
                            sums[o][c] = column[c * COLUMNS * BETWEEN_PITCH + line - first] << WEIGHT_BITS;
                    continue;
                }
                const int *entry = y_entries + line * y_stride;
                const int begin = entry[0] & ~7, until = min(entry[0] + entry[1], first + lines);
#pragma unroll 1
                for (int at = max(entry[0] & ~3, first); at < until; at += 4) {
                    const Four weights = four_of(entry, at - begin);
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) {
                        const unsigned char *four = column + c * COLUMNS * BETWEEN_PITCH + at - first;
                        sums[o][c] = add_four(sums[o][c], *reinterpret_cast<const unsigned *>(four), weights);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < OWN * CHANNELS; ++i)
            sums[i / CHANNELS][i % CHANNELS] = nbv_saturate_sum(sums[i / CHANNELS][i % CHANNELS]);
        store(lines_to_make, sums);
    }
}
