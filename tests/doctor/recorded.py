"""What `npu-smi` and `hccn_tool` print, in the forms that users and documentation have published.

Nobody here has an NPU: these are shortened from public reports, with other numbers where a report shows many devices.

INFO_A2       vllm-project/vllm-ascend, `npu-smi info` of 910B2C in reports of 2024 and 2025; modelscope/ms-swift, docs
              "NPU support" (910B3)
INFO_A3       vllm-project/vllm-ascend, issues 2035 and 2534 (Atlas 800 A3: two chips per card, column Phy-ID)
INFO_950      reports of Ascend950PR with npu-smi 25.7: more columns, no number in the second line
NO_ACCESS     vllm-project/vllm-ascend, issue 632: a container without the devices' permissions
BOARD         Ascend/mind-cluster, user guide, "npu-smi info -i N -t board"
TOPOLOGY_A2   modelscope/ms-swift, docs "NPU support" (8 x 910B3, full mesh of HCCS)
TOPOLOGY_PCIE the same table with the links that its legend names
TOPOLOGY_A3   reports of 910C: columns by Phy-ID, SIO inside a package, HCCS_SW between packages
"""

INFO_A2 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2.2               Version: 24.1.rc2.2                                           |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B2C              | OK            | 94.3        40                0    / 0             |
| 0                         | 0000:5A:00.0  | 0           0    / 0          20701/ 65536         |
+===========================+===============+====================================================+
| 1     910B2C              | OK            | 100.3       43                0    / 0             |
| 0                         | 0000:19:00.0  | 0           0    / 0          3366 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 124528        | python3.8                | 17400                   |
+===========================+===============+====================================================+
| No running processes found in NPU 1                                                            |
+===========================+===============+====================================================+
"""

INFO_A2_ILL = INFO_A2.replace("| 1     910B2C              | OK   ", "| 1     910B2C              | Alarm")

INFO_A3 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc3.7               Version: 24.1.rc3.7                                           |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 178.8       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3397 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3186 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""

INFO_950 = """\
+--------------------------------------------------------------------------------------------------+
| npu-smi 25.7.rc1.6               Version: 25.7.rc1.6                                            |
+--------+------------------+---------------+-----------------------------------------------------+
| NPU ID | Name             | Health        | Power(W)    Temp(C)           Hugepages-Usage(page) |
|        |                  | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)         |
+========+==================+===============+=====================================================+
| 0      | Ascend950PR      | OK            | 195.6       56                0     / 0             |
|        |                  | 0000:61:00.0  | 0           0    / 0          5239  / 131072        |
+========+==================+===============+=====================================================+
| No running processes found in NPU 0                                                             |
"""

NO_ACCESS = """\
DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)
dcmi model initialized failed, because the device is used. ret is -8020
"""

BOARD = """\
        NPU ID                         : 0
        Product Name                   : IT21HMDB02-B2
        Model                          : NA
        Manufacturer                   : Huawei
        Serial Number                  : 102415083974
        Software Version               : 24.1.rc2.2
        Firmware Version               : 7.3.0.1.231
        Compatibility                  : OK
        Board ID                       : 0x65
        PCB ID                         : A
        BOM ID                         : 1
        PCIe Bus Info                  : 0000:5A:00.0
        Chip Count                     : 1
"""

TOPOLOGY_A2 = """\
\t   NPU0       NPU1       NPU2       NPU3       CPU Affinity
NPU0       X          HCCS       HCCS       HCCS       144-167
NPU1       HCCS       X          HCCS       HCCS       144-167
NPU2       HCCS       HCCS       X          HCCS       96-119
NPU3       HCCS       HCCS       HCCS       X          96-119

Legend:

  X    = Self
  SYS  = Path traversing PCIe and NUMA nodes. Nodes are connected through SMP, such as QPI, UPI.
  PHB  = Path traversing PCIe and the PCIe host bridge of a CPU.
  PIX  = Path traversing a single PCIe switch
  PXB  = Path traversing multipul PCIe switches
  HCCS = Connection traversing HCCS.
  NA   = Unknown relationship.
"""

TOPOLOGY_PCIE = """\
           NPU0       NPU1       CPU Affinity
NPU0       X          PHB        0-23
NPU1       PHB        X          24-47
"""

TOPOLOGY_A3 = """\
          Phy-ID0    Phy-ID1    Phy-ID2    Phy-ID3    CPU Affinity
Phy-ID0    X          SIO        HCCS_SW    HCCS_SW    0-79
Phy-ID1    SIO        X          HCCS_SW    HCCS_SW    0-79
Phy-ID2    HCCS_SW    HCCS_SW    X          SIO        80-159
Phy-ID3    HCCS_SW    HCCS_SW    SIO        X          80-159
"""

LINK_UP, LINK_DOWN = "link status: UP\n", "link status: DOWN\n"
