/* What libnvidia-ml.so.1 answers on one kind of machine, chosen with -D when it is compiled.
 *
 * DISCRETE     two GPUs that answer everything
 * JETSON       one GPU: its name, and "not supported" to all else
 * OLD_DRIVER   as DISCRETE, from before the newer of each pair of calls
 * NO_GPU       a driver without a GPU
 * NO_DRIVER    the library without its kernel module
 * BROKEN_INIT  an error that nobody knows, at once
 * LOST         a GPU that fell off its bus: every question fails
 * GARBAGE      answers, but none that makes sense
 * FILLS_UP     as DISCRETE, and at every question others have more of its memory
 * TRUNCATED    half of the library is not there
 * HANGS_LATER  does not come back from a question; HANGS_AT_INIT not even from its start
 */

#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };

typedef unsigned long long bytes;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { bytes total, free, used; } memory_info;
typedef struct { unsigned pid; bytes used; unsigned instance, compute_instance; } process;
typedef struct { unsigned version, sensor; int celsius; } temperature_v1;

#define MIB (1024ull * 1024ull)

#if defined(JETSON)
#define ANSWER(statement) return NOT_SUPPORTED
#define GPUS 1
#elif defined(LOST)
#define ANSWER(statement) return GPU_IS_LOST
#define GPUS 1
#elif defined(NO_GPU)
#define ANSWER(statement) return NOT_FOUND
#define GPUS 0
#else
#define ANSWER(statement) do { statement; return SUCCESS; } while (0)
#define GPUS 2
#endif

#if defined(GARBAGE)
#define SAYS(sense, garbage) (garbage)
#else
#define SAYS(sense, garbage) (sense)
#endif

static int gpus[2] = {0, 1};
static const char *uuids[2] = {"GPU-00000000-aaaa", "GPU-11111111-bbbb"};

static void hang(void) { for (;;) pause(); }

int nvmlShutdown(void) { return SUCCESS; }

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
#if defined(BROKEN_INIT)
    return 4242;
#elif defined(NO_DRIVER)
    return DRIVER_NOT_LOADED;
#elif defined(HANGS_AT_INIT)
    hang();
#endif
    return SUCCESS;
}

#if defined(BROKEN_INIT)
const char *nvmlErrorString(int error) { (void)error; return "the moon is in the wrong phase"; }
#endif

int nvmlDeviceGetCount_v2(unsigned *count) { *count = GPUS; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, int **device)
{
    if (index >= GPUS) return INVALID_ARGUMENT;
    *device = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, int **device)
{
    for (int i = 0; i < GPUS; i++)
        if (strcmp(uuid, uuids[i]) == 0) { *device = &gpus[i]; return SUCCESS; }
    return NOT_FOUND;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    strncpy(version, SAYS("550.54.15", "\xff\xfe"), length);
    return SUCCESS;
}

int nvmlDeviceGetName(int *device, char *name, unsigned length)
{
#if defined(JETSON)
    strncpy(name, "Orin (nvgpu)", length);
    return SUCCESS;
#endif
    ANSWER(strncpy(name, SAYS(*device ? "NVIDIA RTX A2000" : "NVIDIA GeForce RTX 4070", "\xc3("),
                   length));
}

int nvmlDeviceGetMemoryInfo(int *device, memory_info *memory)
{
    bytes used = 2048 * MIB;
#if defined(FILLS_UP)
    static bytes asked = 0; /* 1024 MiB, then 1152, 1536, 2176, 3072 */
    used = (1024 + 128 * asked * asked) * MIB;
    asked++;
#endif
    ANSWER(memory->total = (*device ? 4096 : 8192) * MIB;
           memory->free = SAYS(memory->total - used, ~0ull);
           memory->used = memory->total - memory->free);
}

int nvmlDeviceGetUtilizationRates(int *device, utilization *rates)
{
#if defined(HANGS_LATER)
    hang();
#endif
    ANSWER(rates->gpu = SAYS(87, 4000000000u); rates->memory = 40);
}

#if !defined(TRUNCATED)

static int processes(unsigned *count, process *list)
{
    if (list == NULL) { *count = 2; return INSUFFICIENT_SIZE; }
    *count = 2;
    list[0] = (process){.pid = 1, .used = 1024 * MIB};
    list[1] = (process){.pid = getpid(), .used = SAYS(512 * MIB, ~0ull - 1)};
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(int *device, unsigned type, unsigned *mhz)
{
    ANSWER(*mhz = SAYS(type == 1 ? 1980 : 0, 4000000000u));
}

int nvmlDeviceGetPowerUsage(int *device, unsigned *milliwatts)
{
    ANSWER(*milliwatts = SAYS(84250, 4000000000u));
}

#if defined(OLD_DRIVER)

int nvmlDeviceGetTemperature(int *device, unsigned sensor, unsigned *celsius)
{
    ANSWER(*celsius = sensor == 0 ? 71 : 0);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(int *device, unsigned long long *reasons)
{
    ANSWER(*reasons = 0x1 | 0x4);
}

int nvmlDeviceGetComputeRunningProcesses_v2(int *device, unsigned *count, process *list)
{
    ANSWER(return processes(count, list));
}

#else

int nvmlDeviceGetTemperatureV(int *device, temperature_v1 *temperature)
{
    ANSWER(temperature->celsius = SAYS(temperature->sensor == 0 ? 71 : 0, -2000000000));
}

int nvmlDeviceGetCurrentClocksEventReasons(int *device, unsigned long long *reasons)
{
    ANSWER(*reasons = SAYS(0x4 | 0x20, 0xffff000000000000ull));
}

int nvmlDeviceGetComputeRunningProcesses_v3(int *device, unsigned *count, process *list)
{
    ANSWER(return processes(count, list));
}

#endif
#endif
