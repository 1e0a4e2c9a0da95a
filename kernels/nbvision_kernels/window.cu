// The window family's frame: one thread makes one pixel, whose window of the source is summed by a Python pixel function
// of window.py, linked in.
//
// Compiled with -D: PIXEL_BYTES of the source (1 gray, 3, 4), the fields of regions.py, and those of frame.cuh.
#include "frame.cuh"

extern "C" __device__ float nbv_window(const unsigned char *channel, long long pitch, int pixel_bytes, const int *x_entry,
                                       const int *y_entry, int width, int height, int place, int values);

#define CHANNELS (PIXEL_BYTES == 1 ? 1 : 3)  // alpha is dropped

extern "C" __global__ void __launch_bounds__(256)
    window(const unsigned char *pixels, const long long *__restrict__ sources, const int *__restrict__ regions,
           const int *__restrict__ x_table, const int *__restrict__ y_table, int x_limit, int y_limit,
           Stored *__restrict__ out, int height, int width, int swap, float gain_0, float gain_1, float gain_2,
           float bias_0, float bias_1, float bias_2, float fill_0, float fill_1, float fill_2 CHAIN_PARAMETERS) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;

    const int *row = regions + (long long)blockIdx.z * REGION_FIELDS;
    const Source source = reinterpret_cast<const Source *>(sources)[2 * row[REGION_IMAGE]];
    const unsigned char *origin = pixels + source.address + row[REGION_Y] * source.pitch +
                                  (long long)(row[REGION_X] * PIXEL_BYTES);
    const int *x_entry = x_table + ((long long)blockIdx.z * width + x) * (x_limit + 4);
    const int *y_entry = y_table + ((long long)blockIdx.z * height + y) * (y_limit + 4);

    float values[3] = {fill_0, fill_1, fill_2};
    if (x_entry[1] > 0 && y_entry[1] > 0) {
        const int place = (x - row[REGION_LEFT]) * PIXEL_BYTES, line_values = row[REGION_OUT_WIDTH] * PIXEL_BYTES;
        // Not unrolled: of several calls none would be inlined.
#pragma unroll 1
        for (int c = 0; c < CHANNELS; ++c) {
            const float value = nbv_window(origin + c, source.pitch, PIXEL_BYTES, x_entry, y_entry, row[REGION_WIDTH],
                                           row[REGION_HEIGHT], place + c, line_values);
            if (c == 0) values[0] = value;
            if (c == 1 || CHANNELS == 1) values[1] = value;
            if (c == 2 || CHANNELS == 1) values[2] = value;
        }
    }
#ifdef CHAIN
    const float numbers[] = {CHAIN_NUMBERS};
    shade_pixel(values, x, y, bgr, numbers);
#endif
    const Shading shading = {{gain_0, gain_1, gain_2}, {bias_0, bias_1, bias_2}, swap};
    const long long plane = (long long)height * width;
    store_pixel(out + (long long)blockIdx.z * OUT_CHANNELS * plane, plane, (long long)y * width + x, values, shading);
}
