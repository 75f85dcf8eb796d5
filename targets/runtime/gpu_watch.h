/* Where the state of the GPU comes from: NVML, or the files of a Jetson board. */
#ifndef GPU_WATCH_H
#define GPU_WATCH_H

#include "gpu_state.h"

/* Find the sources for the GPU with this address on the PCI bus; once per process. */
void gpu_watch_open(const char *pci_bus_id);

void gpu_watch_read(struct gpu_state *state);

/* The version of the driver, such as "550.54.15"; empty where the system does not say. */
const char *gpu_watch_driver(void);

#endif
