// The frame of the plan through matrices: one thread makes one pixel, whose place and value are Python pixel functions of
// warp.py, linked in.
//
// Compiled with -D: PIXEL_BYTES of the source (1 gray, 3, 4), COEFFICIENTS of a canvas, and those of frame.cuh.
#include "frame.cuh"

extern "C" __device__ unsigned nbv_warp(const unsigned char *pixels, const unsigned *words, long long base, long long pitch,
                                        int height, int width, const float *coefficients, int x, int y, int perspective,
                                        int border, int fill);

extern "C" __global__ void __launch_bounds__(256)
    warp_plan(const unsigned char *pixels, const unsigned *words, const long long *__restrict__ sources,
              const long long *__restrict__ images, const float *__restrict__ coefficients, Stored *__restrict__ out,
              int height, int width, int swap, float gain_0, float gain_1, float gain_2, float bias_0, float bias_1,
              float bias_2, int perspective, int border, int fill, int image_count CHAIN_PARAMETERS) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;

    const long long image = images[blockIdx.z];  // from the device, where nobody has looked at it yet
    const long long *source = sources + 4 * image;
    unsigned packed = fill;
    if (image >= 0 && image < image_count && source[2] > 0)
        packed = nbv_warp(pixels, words, source[0], source[1], (int)source[2], (int)source[3],
                          coefficients + (long long)blockIdx.z * COEFFICIENTS, x, y, perspective, border, fill);
#if PIXEL_BYTES == 1
    const float gray = (float)(packed & 255);
    float values[3] = {gray, gray, gray};
#else
    float values[3] = {(float)(packed & 255), (float)(packed >> 8 & 255), (float)(packed >> 16 & 255)};
#endif
#ifdef CHAIN
    const float numbers[] = {CHAIN_NUMBERS};
    shade_pixel(values, x, y, bgr, numbers);
#endif
    const Shading shading = {{gain_0, gain_1, gain_2}, {bias_0, bias_1, bias_2}, swap};
    const long long plane = (long long)height * width;
    store_pixel(out + (long long)blockIdx.z * OUT_CHANNELS * plane, plane, (long long)y * width + x, values, shading);
}
