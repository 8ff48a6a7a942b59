/* config_amx.h: the tile unit's configuration: eight tiles of 16 rows of 64 bytes. A task sets it up, and puts back at its end
 * what the thread had. */
#ifndef QL_CONFIG_AMX_H
#define QL_CONFIG_AMX_H

#include <immintrin.h>
#include <stdint.h>

/* gcc 12's tile intrinsics do not tell the compiler that they read and write memory */
#define MEMORY_BARRIER() __asm__ volatile("" : : : "memory")

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* *before = what the thread had: llama.cpp configures its tiles once a thread and would meet an illegal instruction */
static void configure_tiles(tile_config *before) {
    tile_config config = {.palette = 1};
    _tile_storeconfig(before);
    for (int t = 0; t < 8; t++) { config.row_bytes[t] = 64, config.rows[t] = 16; }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* the intrinsic claims to read 8 bytes only */
    _tile_loadconfig(&config);
}

static void restore_tiles(const tile_config *before) {
    MEMORY_BARRIER();
    _tile_loadconfig(before); /* releases the tiles where there was no configuration */
}

#endif
